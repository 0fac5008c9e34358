"""Steering with the plain ``openai`` package, and with this package's own client, against the real server.

Each test is also an example: it has the code that a user writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

from tests.server.conftest import ADMIN_KEY, ALIAS, ALIAS_ALPHA, API_KEY, KIND_LAYER, ServedModel
from tests.support.tiny_models import HIDDEN_SIZE
from vllm_steer import Direction, Readout, Steering, Watch
from vllm_steer.client import AsyncSteerClient, ServerRefusal, SteerClient
from vllm_steer.errors import BadAlpha, ChangeNotAllowed, DirectionChanged, LayerNotHooked, UnknownDirection

pytestmark = [pytest.mark.slow, pytest.mark.server]

MESSAGES = [{"role": "user", "content": "Tell me about your day"}]
KIND = [{"direction": "kind", "alpha": ALIAS_ALPHA}]
LENGTH = 12
# The trace's mean and the readout's projection are the same sum in another order; another token is off by far more.
TOLERANCE = {"rel": 1e-3, "abs": 1e-3}


@pytest.fixture(scope="module")
def client(served: ServedModel) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def steer_client(served: ServedModel) -> Iterator[SteerClient]:
    with SteerClient(served.url, "tiny", api_key=API_KEY, admin_key=ADMIN_KEY) as client:
        yield client


def said(client: openai.OpenAI, model: str = "tiny", **extra_body: object) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=LENGTH,
        temperature=0,
        extra_body={"ignore_eos": True, **extra_body},
    )
    return str(reply.choices[0].message.content)


def test_a_chat_is_steered_by_extra_body(client: openai.OpenAI) -> None:
    assert said(client, steering=KIND) != said(client)


def test_an_alias_is_a_model_for_clients_that_can_send_nothing_else(client: openai.OpenAI) -> None:
    assert ALIAS in [model.id for model in client.models.list()]
    assert said(client, model=ALIAS) == said(client, steering=KIND)


def test_a_readout_comes_with_each_choice(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=LENGTH,
        n=3,
        temperature=1,
        extra_body={"readout": {"layers": [KIND_LAYER], "project": ["kind"], "span": "generated"}, "ignore_eos": True},
    )
    assert len(reply.choices) == 3
    for choice in reply.choices:
        readout = choice.readout  # the openai package keeps fields that it does not know
        assert readout["num_tokens"] == LENGTH - 1
        assert isinstance(readout["projections"]["kind"][str(KIND_LAYER)], float)


def test_the_projection_can_be_watched_while_the_answer_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=LENGTH,
        temperature=0,
        stream=True,
        extra_body={
            "steering": KIND,
            "readout": {"layers": [KIND_LAYER], "span": "generated", "project": ["kind"], "trace": ["kind"]},
            "ignore_eos": True,
        },
    )
    scores: list[float] = []
    text = ""
    for chunk in stream:
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        trace = getattr(choice, "trace", None) or {}
        if "kind" in trace:
            assert trace["kind"]["start"] == len(scores)
            scores += trace["kind"]["values"]
    assert text == said(client, steering=KIND)
    assert len(scores) == choice.readout["num_tokens"] == LENGTH - 1
    assert np.mean(scores) == pytest.approx(choice.readout["projections"]["kind"][str(KIND_LAYER)], **TOLERANCE)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"direction": "nobody", "alpha": 1}, "unknown_direction"),
        ({"direction": "kind", "alpha": 1, "layer": 0}, "layer_not_hooked"),
        ({"direction": "kind", "alpha": 1e9}, "bad_alpha"),
        ({"direction": "kind", "alpha": "much"}, "bad_alpha"),
    ],
)
def test_a_refusal_is_a_bad_request_to_the_openai_package_before_any_stream(
    client: openai.OpenAI, stream: bool, entry: dict[str, object], code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=1, stream=stream, extra_body={"steering": [entry]}
        )
    assert refused.value.code == code
    assert isinstance(refused.value.body, dict)
    assert any(word in refused.value.body["message"] for word in ("allowed", "registered", "hooked"))


def test_a_wrong_key_is_refused(served: ServedModel) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="guess", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        said(stranger, steering=KIND)
    with SteerClient(served.url, "tiny", api_key="guess") as stranger, pytest.raises(ServerRefusal) as refused:
        stranger.show()
    assert refused.value.status == 401


def test_the_own_client_reads_vectors_and_traces_as_arrays(steer_client: SteerClient) -> None:
    options = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    readout = Readout([KIND_LAYER], "generated", ["kind"], trace=["kind"])
    (choice,) = steer_client.chat(
        MESSAGES, steering=[Steering("kind", ALIAS_ALPHA)], readout=readout, **options
    ).choices
    assert choice.readout is not None, choice.readout_error
    assert choice.readout.mean[KIND_LAYER].shape == (HIDDEN_SIZE,)
    assert choice.readout.trace["kind"].shape == (choice.readout.num_tokens,)
    pieces = list(
        steer_client.stream_chat(MESSAGES, steering=[Steering("kind", ALIAS_ALPHA)], readout=readout, **options)
    )
    assert "".join(piece.text for piece in pieces) == choice.text
    streamed = np.concatenate([piece.trace["kind"].values for piece in pieces if "kind" in piece.trace])
    # one request twice, in batches that may differ; a wrong token is off by far more
    np.testing.assert_allclose(streamed, choice.readout.trace["kind"], rtol=1e-3, atol=1e-3)


def test_a_stop_ends_choice_and_stream_at_its_token_and_is_counted(
    client: openai.OpenAI, steer_client: SteerClient
) -> None:
    options = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "logprobs": True}
    traced = Readout([KIND_LAYER], "generated", vectors=False, trace=["kind"])
    (whole,) = steer_client.chat(MESSAGES, steering=[Steering("kind", ALIAS_ALPHA)], readout=traced, **options).choices
    assert whole.readout is not None
    values = whole.readout.trace["kind"]
    at, between = 1, float(values[:2].mean())  # the second token is the first on its side of the mean of the two
    bound = {"below" if values[1] < values[0] else "above": between}
    before = count_of(client, "vllm_steer_stops_total"), count_of(client, "vllm_steer_flags_total")

    asked = Readout(span="generated", stop=Watch("kind", **bound), flag=[Watch("kind", **bound)], trace=["kind"])
    (choice,) = steer_client.chat(MESSAGES, steering=[Steering("kind", ALIAS_ALPHA)], readout=asked, **options).choices
    assert (choice.finish_reason, choice.body["stop_reason"]) == ("stop", "vllm_steer:kind")
    tokens, all_tokens = (one.body["logprobs"]["content"] for one in (choice, whole))
    assert [one["token"] for one in tokens] == [one["token"] for one in all_tokens[: at + 1]]
    assert choice.readout is not None, choice.readout_error
    assert choice.readout.num_tokens == at + 1, "the last token was computed too"
    assert choice.readout.stopped is not None
    assert choice.readout.stopped.value == pytest.approx(values[at], **TOLERANCE)
    assert [flag.position for flag in choice.readout.flags] == [choice.readout.stopped.position]

    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=LENGTH,
        temperature=0,
        stream=True,
        extra_body={
            "steering": KIND,
            "readout": {"stop": {"direction": "kind", **bound}},
            "ignore_eos": True,
        },
    )
    pieces = [chunk.choices[0] for chunk in stream]
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.text
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "vllm_steer:kind")
    assert pieces[-1].readout["stopped"]["position"] == choice.readout.stopped.position
    after = count_of(client, "vllm_steer_stops_total"), count_of(client, "vllm_steer_flags_total")
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)


def count_of(client: openai.OpenAI, series: str) -> float:
    """The present value of a counter of the server, for the direction "kind"."""
    told = httpx.get(str(client.base_url.copy_with(path="/metrics"))).text
    found = [line for line in told.splitlines() if line.startswith(f'{series}{{direction="kind"}}')]
    return float(found[0].split()[-1]) if found else 0.0


def test_the_own_client_raises_what_the_offline_api_raises(steer_client: SteerClient) -> None:
    for entry, kind in (
        (Steering("kind", 1e9), BadAlpha),
        (Steering("nobody", 1.0), UnknownDirection),
        (Steering("kind", 1.0, layer=0), LayerNotHooked),
    ):
        with pytest.raises(kind):
            steer_client.complete("x", steering=[entry])
        with pytest.raises(kind):
            next(steer_client.stream_complete("x", steering=[entry]))


def test_directions_are_put_used_replaced_and_deleted(served: ServedModel, steer_client: SteerClient) -> None:
    rng = np.random.default_rng(5)
    first, second = (Direction("mine", KIND_LAYER, rng.standard_normal(HIDDEN_SIZE)).normalised() for _ in range(2))
    options = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}

    def text() -> str:
        reply = steer_client.complete("Once upon a time", steering=[Steering("mine", ALIAS_ALPHA)], **options)
        return reply.choices[0].text

    assert steer_client.put_directions("mine", [first], only_new=True) == first.content_hash
    with pytest.raises(DirectionChanged):
        steer_client.put_directions("mine", [second], only_new=True)
    by_first = text()
    assert steer_client.put_directions("mine", [second], if_match=first.content_hash) == second.content_hash
    assert text() != by_first
    with pytest.raises(DirectionChanged):
        steer_client.delete_directions("mine", if_match=first.content_hash)
    (stored,) = steer_client.get_directions("mine")
    np.testing.assert_array_equal(stored.vector, second.vector)
    assert ("mine", KIND_LAYER) in [(one.name, one.layer) for one in steer_client.list_directions()]
    with (
        SteerClient(served.url, "tiny", api_key=API_KEY, admin_key="guess") as stranger,
        pytest.raises(ChangeNotAllowed),
    ):
        stranger.delete_directions("mine")
    steer_client.delete_directions("mine")
    with pytest.raises(UnknownDirection):
        text()


def test_the_own_client_shows_what_the_server_can_do(steer_client: SteerClient) -> None:
    shown = steer_client.show()
    assert KIND_LAYER in shown.layers
    assert shown.aliases[ALIAS] == (Steering("kind", ALIAS_ALPHA),)
    assert "kind" in [direction.name for direction in shown.directions]


def test_the_asynchronous_client_runs_many_at_once(served: ServedModel) -> None:
    async def texts() -> list[str]:
        async with AsyncSteerClient(served.url, "tiny", api_key=API_KEY) as client:
            replies = await asyncio.gather(
                *(
                    client.complete("Once", steering=[Steering("kind", alpha)], max_tokens=4, temperature=0)
                    for alpha in (0.0, ALIAS_ALPHA, 0.0, ALIAS_ALPHA)
                )
            )
            return [reply.choices[0].text for reply in replies]

    first, second, *again = asyncio.run(texts())
    assert first != second
    assert again == [first, second]
