from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from batch_jobs.endpoint.chat import (
    NO_UTF8_FORM,
    ChatClient,
    ChatReply,
    Endpoint,
    EndpointError,
    RequestRefused,
)
from batch_jobs.endpoint.parallel_calls import parallel_calls
from batch_jobs.texts.thought import OPEN_THOUGHT
from tests.support.server.fake_endpoint import Answer, fake_endpoint, said

QUESTION = [{"role": "user", "content": "Who are you?"}]


def ask(client: ChatClient) -> ChatReply:
    return client.complete(QUESTION, temperature=0.5, max_tokens=7, seed=3)


def test_a_reply_comes_back_stripped_and_the_request_says_all_that_was_asked() -> None:
    with fake_endpoint(lambda _: said(" I am D. \n")) as fake, ChatClient(fake.endpoint("m")) as client:
        assert ask(client) == ChatReply("I am D.", "stop")
    asked = {"model": "m", "messages": QUESTION, "temperature": 0.5, "max_tokens": 7, "seed": 3}
    assert fake.requests == [asked]
    assert fake.authorizations == [None]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_failure_is_waited_out_longer_each_time(status: int) -> None:
    waits: list[float] = []
    answers = iter([Answer({"error": "busy"}, status), Answer({"error": "busy"}, status), said("yes")])
    with (
        fake_endpoint(lambda _: next(answers)) as fake,
        ChatClient(fake.endpoint(), sleep=waits.append) as client,
    ):
        assert ask(client).text == "yes"
    # 1 s and 2 s, each up to a quarter off
    assert 0.75 <= waits[0] <= 1.25
    assert 1.5 <= waits[1] <= 2.5


@pytest.mark.parametrize("as_date", [False, True])
def test_the_wait_a_server_asks_for_is_kept(as_date: bool) -> None:
    waits: list[float] = []
    later = "30" if not as_date else format_datetime(datetime.now(UTC) + timedelta(seconds=31), usegmt=True)
    answers = iter([Answer({}, 429, {"Retry-After": later}), said("yes")])
    with (
        fake_endpoint(lambda _: next(answers)) as fake,
        ChatClient(fake.endpoint(), sleep=waits.append) as client,
    ):
        assert ask(client).text == "yes"
    # a date has whole seconds, and the request itself takes a moment
    assert 28 <= waits[0] <= 31


def test_a_wait_of_an_hour_ends_the_call_instead() -> None:
    with (
        fake_endpoint(lambda _: Answer({}, 429, {"Retry-After": "3600"})) as fake,
        ChatClient(fake.endpoint(), sleep=pytest.fail) as client,
        pytest.raises(EndpointError, match="asks to wait 3600 s"),
    ):
        ask(client)
    assert len(fake.requests) == 1


def test_attempts_end_and_the_error_names_the_last_trouble() -> None:
    with (
        fake_endpoint(lambda _: Answer(b"upstream is gone", 502)) as fake,
        ChatClient(fake.endpoint(), max_attempts=3, sleep=lambda _: None) as client,
        pytest.raises(EndpointError, match=r"did not answer in 3 attempts.*502: upstream is gone"),
    ):
        ask(client)
    assert len(fake.requests) == 3


def test_no_server_is_an_error_after_the_attempts() -> None:
    with fake_endpoint(lambda _: said("")) as fake:
        gone = fake.endpoint()
    waits: list[float] = []
    with (
        ChatClient(gone, max_attempts=2, sleep=waits.append) as client,
        pytest.raises(EndpointError, match=r"did not answer in 2 attempts.*ConnectError"),
    ):
        ask(client)
    assert len(waits) == 1


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (401, EndpointError, "without an API key.*MODEL@URL#VARIABLE"),
        (404, EndpointError, "not found.*model's name"),
        (418, EndpointError, "status 418"),
        (302, EndpointError, "status 302"),
        (400, RequestRefused, "refused the request"),
    ],
)
def test_a_lasting_refusal_is_not_repeated(status: int, kind: type[EndpointError], told: str) -> None:
    with (
        fake_endpoint(lambda _: Answer({"error": "no"}, status)) as fake,
        ChatClient(fake.endpoint(), sleep=pytest.fail) as client,
        pytest.raises(EndpointError, match=told) as caught,
    ):
        ask(client)
    assert type(caught.value) is kind
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "body",
    [b"<html>Welcome</html>", {"choices": []}, {"choices": [{"text": "old"}]}, [1], {"choices": [{"message": "hi"}]}],
)
def test_a_reply_that_is_no_chat_completion_is_shown(body: Any) -> None:
    with (
        fake_endpoint(lambda _: Answer(body)) as fake,
        ChatClient(fake.endpoint()) as client,
        pytest.raises(EndpointError, match="no chat completion but"),
    ):
        ask(client)


def test_a_message_without_text_is_an_empty_reply() -> None:
    with fake_endpoint(lambda _: said(None, "content_filter")) as fake, ChatClient(fake.endpoint()) as client:
        assert ask(client) == ChatReply("", "content_filter")


@pytest.mark.parametrize(
    ("content", "beside", "reply"),
    [
        ("<think>Hm.</think>\n\nI am D.", {}, ChatReply("I am D.", "stop")),
        ("Hm.</think>\n\nI am D.", {}, ChatReply("I am D.", "stop")),
        ("<think>Hm, I", {}, ChatReply("", "stop", fault=OPEN_THOUGHT)),
        ("I am D. <think>Am I", {}, ChatReply("", "stop", fault=OPEN_THOUGHT)),
        ("I am D.", {"reasoning_content": "Hm."}, ChatReply("I am D.", "stop")),
        ("I am D.", {"reasoning": "Hm."}, ChatReply("I am D.", "stop")),
        (None, {"reasoning_content": "Hm, I"}, ChatReply("", "stop", fault=OPEN_THOUGHT)),
        (None, {"reasoning": "Hm, I"}, ChatReply("", "stop", fault=OPEN_THOUGHT)),
        (None, {"reasoning": "Hm, I", "refusal": "No."}, ChatReply("", "stop", refusal="No.")),
        (None, {"reasoning": None}, ChatReply("", "stop")),
        ("half \ud83d", {}, ChatReply("", "stop", fault=NO_UTF8_FORM)),
        (None, {"refusal": "No \ud83d"}, ChatReply("", "stop", refusal="No \\ud83d")),
    ],
)
def test_the_answer_is_what_is_left_without_the_thought(
    content: str | None, beside: dict[str, Any], reply: ChatReply
) -> None:
    with fake_endpoint(lambda _: said(content, **beside)) as fake, ChatClient(fake.endpoint()) as client:
        assert ask(client) == reply


NEW_LIMIT = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
NO_ZERO = (
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
)
STRICT_LIMIT = [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]
STRICT_SEED = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]


@pytest.mark.parametrize(
    ("refused", "taken", "told"),
    [
        ({"max_tokens": NEW_LIMIT}, {"max_completion_tokens": 7, "temperature": 0.5, "seed": 3}, []),
        ({"max_tokens": STRICT_LIMIT}, {"max_completion_tokens": 7, "temperature": 0.5, "seed": 3}, []),
        ({"temperature": NO_ZERO}, {"max_tokens": 7, "seed": 3}, ["does not accept temperature"]),
        ({"seed": STRICT_SEED}, {"max_tokens": 7, "temperature": 0.5}, ["does not accept seed"]),
        (
            {"max_tokens": NEW_LIMIT, "temperature": NO_ZERO, "seed": STRICT_SEED},
            {"max_completion_tokens": 7},
            ["does not accept seed", "does not accept temperature"],
        ),
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_what_an_endpoint_does_not_take_is_asked_for_in_another_form_that_is_kept(
    refused: dict[str, Any], taken: dict[str, Any], told: list[str], status: int
) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        fault = next((message for field, message in refused.items() if field in request), None)
        return said("yes") if fault is None else Answer({"error": {"message": fault}}, status)

    warnings: list[str] = []
    with fake_endpoint(answer) as fake, ChatClient(fake.endpoint("m"), warn=warnings.append) as client:
        assert ask(client).text == "yes"
        assert len(fake.requests) == 1 + len(refused)
        assert fake.requests[-1] == {"model": "m", "messages": QUESTION, **taken}
        assert ask(client).text == "yes"
    assert len(fake.requests) == 2 + len(refused)
    assert fake.requests[-1] == fake.requests[-2]
    assert len(warnings) == len(told)
    for warning, words in zip(warnings, told, strict=True):
        assert words in warning


@pytest.mark.parametrize(
    "fault",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 7. This model's maximum context length is 5 tokens.",
        "max_tokens is too large: 7. This model supports at most 5 completion tokens.",
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2.",
        "temperature must be between 0 and 1",
        "The prompt is not permitted by our content policy.",
    ],
)
def test_a_value_that_is_refused_is_not_replaced_by_the_endpoints_own(fault: str) -> None:
    with (
        fake_endpoint(lambda _: Answer({"error": {"message": fault}}, 400)) as fake,
        ChatClient(fake.endpoint(), warn=pytest.fail) as client,
        pytest.raises(RequestRefused, match="refused the request"),
    ):
        ask(client)
    assert len(fake.requests) == 1


def test_a_form_that_is_refused_as_well_is_not_kept() -> None:
    answers = iter([Answer({"error": NEW_LIMIT}, 400), Answer({"error": "filtered"}, 400), said("yes")])
    with fake_endpoint(lambda _: next(answers)) as fake, ChatClient(fake.endpoint()) as client:
        with pytest.raises(RequestRefused, match="filtered"):
            ask(client)
        assert ask(client).text == "yes"
    limits = [next(name for name in request if name.startswith("max_")) for request in fake.requests]
    assert limits == ["max_tokens", "max_completion_tokens", "max_tokens"]


def test_many_threads_learn_a_form_once() -> None:
    def answer(request: dict[str, Any]) -> Answer:
        if "max_tokens" in request:
            return Answer({"error": NEW_LIMIT}, 400)
        return Answer({"error": NO_ZERO}, 400) if "temperature" in request else said("yes")

    warnings: list[str] = []
    with fake_endpoint(answer) as fake, ChatClient(fake.endpoint(), warn=warnings.append) as client:
        replies = list(parallel_calls(lambda _: ask(client).text, range(24), workers=6))
    assert [text for _, text in replies] == ["yes"] * 24
    assert len(warnings) == 1
    # each thread at most once in each of the two forms
    assert len(fake.requests) <= 24 + 2 * 6


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", "sk-very-secret")
    with (
        fake_endpoint(lambda _: Answer({"error": "bad key sk-very-secret"}, 401)) as fake,
        ChatClient(fake.endpoint(variable="FAKE_KEY")) as client,
    ):
        with pytest.raises(EndpointError, match="the key in FAKE_KEY") as caught:
            ask(client)
        shown = f"{caught.value!r} {vars(caught.value)} {client.endpoint!r} {client!r}"
    assert fake.authorizations == ["Bearer sk-very-secret"]
    assert "secret" not in shown


def test_a_key_that_is_not_set_is_named_before_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_KEY", raising=False)
    with pytest.raises(EndpointError, match="variable FAKE_KEY is not set"):
        ChatClient(Endpoint("http://127.0.0.1:9/v1", "m", "FAKE_KEY"))


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("gpt@https://api.x.com/v1/#KEY", Endpoint("https://api.x.com/v1", "gpt", "KEY")),
        ("@cf/meta@http://localhost:8000/v1", Endpoint("http://localhost:8000/v1", "@cf/meta", None)),
    ],
)
def test_an_endpoint_is_read_from_one_word(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint


@pytest.mark.parametrize(
    "text", ["gpt", "@http://x/v1", "http://x/v1", "m@ftp://x", "m@http://x/v1#sk-secret-12", "m\udcff@http://x/v1"]
)
def test_another_form_of_endpoint_is_refused_without_repeating_a_key(text: str) -> None:
    with pytest.raises(EndpointError, match="MODEL@URL") as caught:
        Endpoint.parse(text)
    assert "secret" not in str(caught.value)
