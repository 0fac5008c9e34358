"""OpenAI's Python package: unknown fields go into ``extra_body`` and come back as attributes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.conftest import (
    ALIAS,
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
)

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


def test_a_response_is_steered_by_extra_body(client: openai.OpenAI, chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        reply = client.responses.create(
            model=MODEL, input=PROMPT, max_output_tokens=NUM_TOKENS, temperature=0, extra_body={"steering": steering}
        )
        assert reply.output_text == text


def test_a_readout_comes_with_the_choice(client: openai.OpenAI, served: Served) -> None:
    plain, steered = (chat(client, steering=spec, readout=READOUT).readout for spec in ([], STEERING))
    layer = str(served.layer)
    assert plain["num_tokens"] == steered["num_tokens"] == NUM_TOKENS - 1
    assert steered["projections"]["kind"][layer] > plain["projections"]["kind"][layer] + 1


def test_an_alias_is_a_model(client: openai.OpenAI, chat_texts: Texts) -> None:
    assert ALIAS in [model.id for model in client.models.list()]
    assert chat(client, model=ALIAS).message.content == chat_texts.steered


def test_a_refusal_is_a_bad_request_that_is_not_tried_again(client: openai.OpenAI, served: Served) -> None:
    before = served.answers(CHAT, 400)
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, steering=REFUSED)
    assert refused.value.code == REFUSAL
    assert served.answers(CHAT, 400) == before + 1


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
