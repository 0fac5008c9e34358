"""LangChain's OpenAI package: a model's ``extra_body`` steers all its calls, a bound one the calls of that binding.

An ``extra_body`` that is bound or passed to a call replaces the model's own and is not merged with it: binding only a
readout to a steered model removes the steering.

LangChain drops the readout on every route; the reply's id brings it back from ``/v1/steering/readouts/{id}``. It is in
``response_metadata["id"]`` of a whole chat. Streams and bare texts lose the id too, so choose it: vLLM names a reply to
the header ``X-Request-Id: mine`` ``chatcmpl-mine`` or ``cmpl-mine``. The header ``x-vllm-steer`` is in
``response_metadata["headers"]`` of a model made with ``include_response_headers=True``.

A cache distinguishes steered chats from plain ones. For bare texts it considers the model's own ``extra_body``, but not
a bound one.

Models share their connections: code that calls ``asyncio.run`` twice in a process needs an ``http_async_client`` for
each call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import ModelInvalidRequestError
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.conftest import (
    ALIAS,
    ALPHA,
    API_KEY,
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

CLIENT = "LangChain"
CHAT, BARE = "/v1/chat/completions", "/v1/completions"
Steering = list[dict[str, Any]]


@pytest.fixture
def access(served: Served) -> dict[str, Any]:
    """The arguments of a model's constructor, with the default of two retries."""
    return {
        "model": MODEL,
        "base_url": served.base_url,
        "api_key": API_KEY,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
    }


def steered(steering: Steering) -> dict[str, Any]:
    return {"extra_body": {"steering": steering}}


async def async_texts(fields: dict[str, Any], specs: list[Steering], stream: bool = False) -> list[str]:
    """One model's answers to concurrent calls with these steerings."""
    async with openai.DefaultAsyncHttpxClient() as http_client:
        model = ChatOpenAI(**fields, http_async_client=http_client)

        async def text(steering: Steering) -> str:
            if not stream:
                return (await model.ainvoke(PROMPT, **steered(steering))).text
            return "".join([chunk.text async for chunk in model.astream(PROMPT, **steered(steering))])

        return await asyncio.gather(*(text(steering) for steering in specs))


@pytest.mark.cell(CLIENT, body="`extra_body`")
def test_a_chat_model_is_steered_by_its_extra_body(access: dict[str, Any], chat_texts: Texts) -> None:
    assert ChatOpenAI(**access, **steered(STEERING)).invoke(PROMPT).content == chat_texts.steered
    assert ChatOpenAI(**access, **steered([])).invoke(PROMPT).content == chat_texts.plain
    assert ChatOpenAI(**access).invoke(PROMPT).content == chat_texts.plain


def test_a_chat_model_on_the_responses_route_is_steered(access: dict[str, Any], chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        assert ChatOpenAI(**access, **steered(steering), use_responses_api=True).invoke(PROMPT).text == text


def test_a_model_of_bare_texts_is_steered(access: dict[str, Any], completion_texts: Texts) -> None:
    for steering, text in ((STEERING, completion_texts.steered), ([], completion_texts.plain)):
        model = OpenAI(**access, **steered(steering))
        assert model.invoke(PROMPT) == "".join(model.stream(PROMPT)) == text


def test_a_call_is_steered_by_a_bound_extra_body(access: dict[str, Any], chat_texts: Texts) -> None:
    model = ChatOpenAI(**access)
    assert model.bind(**steered(STEERING)).invoke(PROMPT).content == chat_texts.steered
    assert model.invoke(PROMPT, **steered(STEERING)).content == chat_texts.steered
    assert model.invoke(PROMPT).content == chat_texts.plain
    with pytest.raises(TypeError, match="steering"):
        model.bind(steering=STEERING).invoke(PROMPT)


def test_a_bound_extra_body_takes_the_place_of_the_models_own(access: dict[str, Any], chat_texts: Texts) -> None:
    model = ChatOpenAI(**access, **steered(STEERING))
    assert model.bind(**steered([])).invoke(PROMPT).content == chat_texts.plain
    assert model.bind(extra_body={"readout": READOUT}).invoke(PROMPT).content == chat_texts.plain


@pytest.mark.cell(CLIENT, whole="dropped", stream="dropped")
def test_of_a_readout_only_the_header_is_seen(access: dict[str, Any], chat_texts: Texts) -> None:
    model = ChatOpenAI(**access, include_response_headers=True)
    reply = model.invoke(PROMPT, extra_body={"steering": STEERING, "readout": READOUT})
    assert reply.content == chat_texts.steered
    assert reply.response_metadata["headers"]["x-vllm-steer"] == "1"
    assert "projections" not in repr(reply)
    assert "projections" not in repr(list(model.stream(PROMPT, extra_body={"readout": READOUT})))
    assert "x-vllm-steer" not in model.invoke(PROMPT).response_metadata["headers"]


@pytest.mark.cell(CLIENT, id='`response_metadata["id"]`; in streams one of your own')
def test_the_id_of_a_chat_brings_its_projection_back(access: dict[str, Any], served: Served) -> None:
    layer, values = str(served.layer), []
    for steering in (STEERING, []):
        model = ChatOpenAI(**access, extra_body={"steering": steering, "readout": READOUT})
        reply = model.invoke(PROMPT)
        mine = f"mine-{len(values)}"
        assert list(model.stream(PROMPT, extra_headers={"X-Request-Id": mine}))
        texts = OpenAI(**access, extra_body={"steering": steering, "readout": READOUT})
        assert texts.invoke(PROMPT, extra_headers={"X-Request-Id": mine})
        ids = (reply.response_metadata["id"], f"chatcmpl-{mine}", f"cmpl-{mine}")
        for (readout,) in [kept(served, one) for one in ids]:
            assert readout["num_tokens"] == NUM_TOKENS - 1
            values.append(readout["projections"]["kind"][layer])
    assert min(values[:3]) > max(values[3:]) + 1


@pytest.mark.cell(CLIENT, header="`default_headers`", name="yes")
def test_entries_in_the_models_name_or_a_header_steer(access: dict[str, Any], chat_texts: Texts) -> None:
    named = {**access, "model": f"{MODEL}@kind:{ALPHA}"}
    assert ChatOpenAI(**named).invoke(PROMPT).content == chat_texts.steered
    by_header = ChatOpenAI(**access, default_headers={"X-Steering": f"kind:{ALPHA}"})
    assert by_header.invoke(PROMPT).content == chat_texts.steered
    assert "".join(chunk.text for chunk in by_header.stream(PROMPT)) == chat_texts.steered


@pytest.mark.cell(CLIENT, name="yes")
def test_an_alias_is_a_model(access: dict[str, Any], chat_texts: Texts, completion_texts: Texts) -> None:
    access["model"] = ALIAS
    assert ChatOpenAI(**access).invoke(PROMPT).content == chat_texts.steered
    assert OpenAI(**access).invoke(PROMPT) == completion_texts.steered


@pytest.mark.parametrize(
    ("ask", "path"),
    [
        pytest.param(lambda fields: ChatOpenAI(**fields).invoke(PROMPT), CHAT, id="chat"),
        pytest.param(lambda fields: list(ChatOpenAI(**fields).stream(PROMPT)), CHAT, id="chat, streamed"),
        pytest.param(lambda fields: asyncio.run(async_texts(fields, [REFUSED])), CHAT, id="chat, async"),
        pytest.param(lambda fields: OpenAI(**fields).invoke(PROMPT), BARE, id="bare text"),
    ],
)
def test_a_refusal_is_a_bad_request_that_is_not_tried_again(
    access: dict[str, Any], served: Served, ask: Callable[[dict[str, Any]], Any], path: str
) -> None:
    before = served.answers(path, 400)
    with pytest.raises(openai.BadRequestError, match="'nobody'") as refused:
        ask({**access, **steered(REFUSED)})
    assert refused.value.code == REFUSAL
    assert isinstance(refused.value, ModelInvalidRequestError) == (path == CHAT)  # LangChain's own name for it
    assert served.answers(path, 400) == before + 1


def test_a_stream_is_steered(access: dict[str, Any], chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        chunks = list(ChatOpenAI(**access, **steered(steering)).stream(PROMPT))
        assert len(chunks) > 2
        assert "".join(chunk.text for chunk in chunks) == text


def test_the_async_calls_are_steered_beside_plain_ones(access: dict[str, Any], chat_texts: Texts) -> None:
    specs: list[Steering] = [STEERING, []] * 2
    texts = [chat_texts.steered if spec else chat_texts.plain for spec in specs]
    for stream in (False, True):
        assert asyncio.run(async_texts(access, specs, stream)) == texts


def test_a_cache_of_chats_keeps_steered_ones_apart(access: dict[str, Any], chat_texts: Texts) -> None:
    cache = InMemoryCache()
    plain, model = (ChatOpenAI(**access, cache=cache, **fields) for fields in ({}, steered(STEERING)))
    for _ in range(2):
        assert plain.invoke(PROMPT).content == chat_texts.plain
        assert model.invoke(PROMPT).content == chat_texts.steered
        assert plain.bind(**steered(STEERING)).invoke(PROMPT).content == chat_texts.steered


def test_a_cache_of_bare_texts_knows_the_models_steering_alone(access: dict[str, Any], completion_texts: Texts) -> None:
    cache = InMemoryCache()
    plain, model = (OpenAI(**access, cache=cache, **fields) for fields in ({}, steered(STEERING)))
    assert plain.invoke(PROMPT) == completion_texts.plain
    assert model.invoke(PROMPT) == completion_texts.steered
    assert plain.bind(**steered(STEERING)).invoke(PROMPT) == completion_texts.plain  # what the cache holds
