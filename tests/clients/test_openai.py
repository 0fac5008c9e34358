"""OpenAI's Python package: unknown fields go into ``extra_body`` and come back as attributes.

The header ``X-Steering`` goes into ``default_headers`` of a client or ``extra_headers`` of a call; the model's name and
aliases steer too.

A readout is an attribute of the choice (on the responses route, of the reply); in a stream, of the choice of the last
chunk (there, of ``event.response`` of the closing event). The helper ``chat.completions.stream`` shows the chunks as
they are, but its final completion has lost the readout: ask for it by ``event.chunk.id`` or the completion's ``id``.
The helper ``responses.stream`` keeps it. ``reply.id`` brings a readout back on all routes.

The final completion of the chat helper is not to be had for an answer that ended at ``max_tokens``: the helper then
raises ``LengthFinishReasonError``, with the completion in ``completion``. Its events come all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import (
    ALIAS,
    ALPHA,
    API_KEY,
    MESSAGES,
    MODEL,
    NUM_TOKENS,
    PROMPT,
    READOUT,
    REFUSAL,
    REFUSED,
    STEERING,
    Served,
    Texts,
    kept,
)

CLIENT = "openai for Python"
HELPER = "openai for Python: `chat.completions.stream`"
RESPONSES = "openai for Python: `responses`"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base_url, api_key=API_KEY) as client:  # the default: two retries
        yield client


def chat(client: openai.OpenAI, model: str = MODEL, **extra_body: Any) -> Any:
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=NUM_TOKENS, temperature=0, extra_body=extra_body
    )
    return reply.choices[0]


def kind(readout: dict[str, Any], served: Served) -> float:
    """The projection of a readout of all generated tokens."""
    assert readout["num_tokens"] == NUM_TOKENS - 1
    value: float = readout["projections"]["kind"][str(served.layer)]
    return value


@pytest.mark.cell(CLIENT, body="`extra_body`")
def test_a_chat_is_steered_by_extra_body(client: openai.OpenAI, chat_texts: Texts) -> None:
    assert chat(client, steering=STEERING).message.content == chat_texts.steered
    assert chat(client, steering=[]).message.content == chat_texts.plain
    assert chat(client).message.content == chat_texts.plain


def test_a_completion_is_steered_by_extra_body(client: openai.OpenAI, completion_texts: Texts) -> None:
    for steering, text in ((STEERING, completion_texts.steered), ([], completion_texts.plain)):
        reply = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, extra_body={"steering": steering}
        )
        assert reply.choices[0].text == text


@pytest.mark.cell(RESPONSES, body="`extra_body`")
def test_a_response_is_steered_by_extra_body(client: openai.OpenAI, chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        reply = client.responses.create(
            model=MODEL, input=PROMPT, max_output_tokens=NUM_TOKENS, temperature=0, extra_body={"steering": steering}
        )
        assert reply.output_text == text


@pytest.mark.cell(CLIENT, whole="`choice.readout`")
def test_a_readout_comes_with_the_choice(client: openai.OpenAI, served: Served) -> None:
    plain, steered = (kind(chat(client, steering=spec, readout=READOUT).readout, served) for spec in ([], STEERING))
    assert steered > plain + 1


@pytest.mark.cell(CLIENT, header="`extra_headers`")
@pytest.mark.cell(RESPONSES, header="`extra_headers`")
def test_a_header_steers(client: openai.OpenAI, served: Served, chat_texts: Texts) -> None:
    header = {"X-Steering": f"kind:{ALPHA}"}
    reply = client.responses.create(
        model=MODEL, input=PROMPT, max_output_tokens=NUM_TOKENS, temperature=0, extra_headers=header
    )
    assert reply.output_text == chat_texts.steered
    with openai.OpenAI(base_url=served.base_url, api_key=API_KEY, default_headers=header) as steered:
        assert chat(steered).message.content == chat_texts.steered
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = client.chat.completions.create(**asked, extra_headers=header)
    assert answer.choices[0].message.content == chat_texts.steered


@pytest.mark.cell(CLIENT, name="yes")
@pytest.mark.cell(RESPONSES, name="yes")
@pytest.mark.parametrize("model", [f"{MODEL}@kind:{ALPHA}", ALIAS])
def test_the_models_name_steers(client: openai.OpenAI, chat_texts: Texts, model: str) -> None:
    assert chat(client, model=model).message.content == chat_texts.steered
    reply = client.responses.create(model=model, input=PROMPT, max_output_tokens=NUM_TOKENS, temperature=0)
    assert reply.output_text == chat_texts.steered


@pytest.mark.cell(CLIENT, id="`reply.id`")
def test_the_id_of_a_reply_brings_its_readout_back(client: openai.OpenAI, served: Served) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0}
    reply = client.chat.completions.create(**asked, extra_body={"steering": STEERING, "readout": READOUT})
    assert kept(served, reply.id) == [reply.choices[0].readout]
    chunks = list(client.chat.completions.create(**asked, extra_body={"readout": READOUT}, stream=True))
    assert kept(served, chunks[0].id) == [chunks[-1].choices[0].readout]


@pytest.mark.cell(RESPONSES, whole="`reply.readout`", stream="`event.response.readout`, last event", id="`reply.id`")
def test_a_response_has_its_readout_in_streams_and_their_helper_too(client: openai.OpenAI, served: Served) -> None:
    asked = {"model": MODEL, "input": PROMPT, "max_output_tokens": NUM_TOKENS, "temperature": 0}
    values = []
    for steering in (STEERING, []):
        body = {"steering": steering, "readout": READOUT}
        with client.responses.stream(**asked, extra_body=body) as stream:
            helped = stream.get_final_response()
        *_, last = client.responses.create(**asked, extra_body=body, stream=True)
        for reply in (client.responses.create(**asked, extra_body=body), last.response, helped):
            assert kept(served, reply.id) == [reply.readout]
            values.append(kind(reply.readout, served))
    assert min(values[:3]) > max(values[3:]) + 1


@pytest.mark.cell(HELPER, body="`extra_body`", stream="`event.chunk`, the last", id="`event.chunk.id`")
def test_the_stream_helper_shows_chunks_with_the_readout(
    client: openai.OpenAI, served: Served, chat_texts: Texts
) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0}
    values = []
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        with client.chat.completions.stream(**asked, extra_body={"steering": steering, "readout": READOUT}) as stream:
            events = list(stream)
            with pytest.raises(openai.LengthFinishReasonError) as ended:
                stream.get_final_completion()
        assert "".join(event.delta for event in events if event.type == "content.delta") == text
        assert ended.value.completion.choices[0].message.content == text
        chunks = [event.chunk for event in events if event.type == "chunk"]
        assert kept(served, chunks[0].id) == [chunks[-1].choices[0].readout]
        values.append(kind(chunks[-1].choices[0].readout, served))
    assert values[0] > values[1] + 1


@pytest.mark.cell(HELPER, header="`extra_headers`", name="yes", whole="dropped from the final completion")
def test_the_stream_helpers_final_completion_has_lost_the_readout(
    client: openai.OpenAI, served: Served, chat_texts: Texts
) -> None:
    end = chat_texts.steered[-4:]  # an answer that ends of itself has a final completion
    asked = {"messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0, "stop": end}
    header, read = {"X-Steering": f"kind:{ALPHA}"}, {"readout": READOUT}
    for model, headers in ((MODEL, header), (f"{MODEL}@kind:{ALPHA}", {}), (ALIAS, {})):
        with client.chat.completions.stream(**asked, model=model, extra_headers=headers, extra_body=read) as stream:
            completion = stream.get_final_completion()
        assert completion.choices[0].message.content == chat_texts.steered.partition(end)[0]
        assert "projections" not in repr(completion)
        [readout] = kept(served, completion.id)
        assert readout["num_tokens"] > 1
        assert readout["projections"]["kind"][str(served.layer)] > 10


def test_an_alias_is_a_model(client: openai.OpenAI, chat_texts: Texts) -> None:
    assert ALIAS in [model.id for model in client.models.list()]
    assert chat(client, model=ALIAS).message.content == chat_texts.steered


def test_a_refusal_is_a_bad_request_that_is_not_tried_again(client: openai.OpenAI, served: Served) -> None:
    before = served.answers(CHAT, 400)
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, steering=REFUSED)
    assert refused.value.code == REFUSAL
    assert served.answers(CHAT, 400) == before + 1


@pytest.mark.cell(CLIENT, stream="`choice.readout`, last chunk")
def test_a_stream_is_steered(client: openai.OpenAI, chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        stream = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"steering": steering, "readout": READOUT},
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        assert chunks[-1].choices[0].readout["num_tokens"] == NUM_TOKENS - 1


def test_the_async_client_is_steered_beside_plain_requests(served: Served, chat_texts: Texts) -> None:
    specs: list[list[dict[str, Any]]] = [STEERING, []] * 4

    async def main() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key=API_KEY) as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=MODEL,
                        messages=MESSAGES,
                        max_tokens=NUM_TOKENS,
                        temperature=0,
                        extra_body={"steering": steering},
                    )
                    for steering in specs
                )
            )
        return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(main()) == [chat_texts.steered if spec else chat_texts.plain for spec in specs]
