"""Anthropic's Python package: unknown fields go into ``extra_body`` and come back as attributes.

``temperature`` goes there too, since this version (2.14) has no parameter for it. The header ``X-Steering`` goes into
``extra_headers`` or a client's ``default_headers``; the model's name and aliases steer too.

A readout is an attribute of a whole message; in a stream, of the event ``message_delta``. The stream helper does not
copy it into its final message, whose ``id`` brings it back.

The server accepts a key only as ``Authorization: Bearer``; this version sends both ``api_key`` and ``auth_token`` that
way. A refusal is a ``BadRequestError`` with the message in ``api_message``, the class of the error in ``type`` and its
code in ``error_code``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.clients.conftest import (
    ALIAS,
    ALPHA,
    API_KEY,
    MESSAGES,
    MODEL,
    NUM_TOKENS,
    READOUT,
    REFUSAL,
    REFUSED,
    STEERING,
    Served,
    Texts,
    kept,
)

CLIENT = "anthropic"
PATH = "/v1/messages"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=API_KEY) as client:  # the default: two retries
        yield client


def asked(model: str = MODEL, **extra_body: Any) -> dict[str, Any]:
    """The arguments of ``messages.create`` and ``messages.stream``."""
    body = {"temperature": 0, **extra_body}
    return {"model": model, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "extra_body": body}


def text_of(message: anthropic.types.Message) -> str:
    [block] = message.content
    assert block.type == "text"
    return block.text


@pytest.mark.cell(CLIENT, body="`extra_body`")
def test_a_message_is_steered_by_extra_body(client: anthropic.Anthropic, chat_texts: Texts) -> None:
    assert text_of(client.messages.create(**asked(steering=STEERING))) == chat_texts.steered
    assert text_of(client.messages.create(**asked(steering=[]))) == chat_texts.plain
    assert text_of(client.messages.create(**asked())) == chat_texts.plain


@pytest.mark.cell(CLIENT, whole="`message.readout`")
def test_a_readout_comes_with_the_message(client: anthropic.Anthropic, served: Served) -> None:
    specs: list[list[dict[str, Any]]] = [[], STEERING]
    plain, steered = (client.messages.create(**asked(steering=spec, readout=READOUT)) for spec in specs)
    layer = str(served.layer)
    assert plain.readout["num_tokens"] == steered.readout["num_tokens"] == NUM_TOKENS - 1
    assert steered.readout["projections"]["kind"][layer] > plain.readout["projections"]["kind"][layer] + 1


@pytest.mark.cell(CLIENT, header="`extra_headers`", name="yes")
def test_a_header_and_the_models_name_steer(client: anthropic.Anthropic, chat_texts: Texts) -> None:
    header = {"X-Steering": f"kind:{ALPHA}"}
    assert text_of(client.messages.create(**asked(), extra_headers=header)) == chat_texts.steered
    for model in (f"{MODEL}@kind:{ALPHA}", ALIAS):
        assert text_of(client.messages.create(**asked(model))) == chat_texts.steered


@pytest.mark.cell(CLIENT, id="`message.id`")
def test_the_id_of_a_message_brings_its_readout_back(client: anthropic.Anthropic, served: Served) -> None:
    values = []
    for steering in (STEERING, []):
        fields = asked(steering=steering, readout=READOUT)
        message = client.messages.create(**fields)
        assert kept(served, message.id) == [message.readout]
        with client.messages.stream(**fields) as stream:
            final = stream.get_final_message()
        assert "projections" not in repr(final)
        [readout] = kept(served, final.id)
        values.append(readout["projections"]["kind"][str(served.layer)])
    assert values[0] > values[1] + 1


def test_an_alias_is_a_model(client: anthropic.Anthropic, chat_texts: Texts) -> None:
    assert ALIAS in [model.id for model in client.models.list()]
    assert text_of(client.messages.create(**asked(model=ALIAS))) == chat_texts.steered


def test_the_tokens_of_an_alias_are_counted_as_the_models(client: anthropic.Anthropic) -> None:
    plain, alias = (client.messages.count_tokens(model=model, messages=MESSAGES) for model in (MODEL, ALIAS))
    assert alias.input_tokens == plain.input_tokens == client.messages.create(**asked(ALIAS)).usage.input_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_refusal_is_a_bad_request_that_is_not_tried_again(
    client: anthropic.Anthropic, served: Served, stream: bool
) -> None:
    before = served.answers(PATH, 400)
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**asked(steering=REFUSED), stream=stream)
    error = refused.value
    assert (error.type, error.error_code) == ("UnknownDirection", REFUSAL)
    assert "'nobody'" in error.api_message
    assert served.answers(PATH, 400) == before + 1


def test_a_refusal_reaches_the_stream_helper_before_its_first_event(
    client: anthropic.Anthropic, served: Served
) -> None:
    before = served.answers(PATH, 400)
    with (
        pytest.raises(anthropic.BadRequestError, match="'nobody'"),
        client.messages.stream(**asked(steering=REFUSED)),
    ):
        pytest.fail("the stream was opened")
    assert served.answers(PATH, 400) == before + 1


@pytest.mark.cell(CLIENT, stream="`readout` of `message_delta`")
def test_a_stream_is_steered(client: anthropic.Anthropic, chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        events = list(client.messages.create(**asked(steering=steering, readout=READOUT), stream=True))
        assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == text
        [end] = [event for event in events if event.type == "message_delta"]
        assert end.readout["num_tokens"] == NUM_TOKENS - 1


def test_the_stream_helper_is_steered(client: anthropic.Anthropic, chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        with client.messages.stream(**asked(steering=steering, readout=READOUT)) as stream:
            events = list(stream)
            assert text_of(stream.get_final_message()) == text
        assert "".join(event.text for event in events if event.type == "text") == text
        [end] = [event for event in events if event.type == "message_delta"]
        assert end.readout["num_tokens"] == NUM_TOKENS - 1


def test_an_auth_token_is_a_key_too(served: Served, chat_texts: Texts) -> None:
    with anthropic.Anthropic(base_url=served.url, auth_token=API_KEY) as client:
        assert text_of(client.messages.create(**asked(steering=STEERING))) == chat_texts.steered
    with (
        anthropic.Anthropic(base_url=served.url, api_key="wrong") as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(**asked(steering=STEERING))


def test_the_async_client_is_steered_beside_plain_requests(served: Served, chat_texts: Texts) -> None:
    specs: list[list[dict[str, Any]]] = [STEERING, []] * 4

    async def main() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, api_key=API_KEY) as client:
            replies = await asyncio.gather(*(client.messages.create(**asked(steering=spec)) for spec in specs))
        return [text_of(reply) for reply in replies]

    assert asyncio.run(main()) == [chat_texts.steered if spec else chat_texts.plain for spec in specs]
