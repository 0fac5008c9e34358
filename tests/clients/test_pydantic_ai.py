"""pydantic-ai: ``extra_body`` in the settings of a model, an agent or a run steers.

The innermost ``extra_body`` wins and is not merged with the others: a run that asks only for a readout is not steered
by its model's. ``extra_headers`` may hold ``X-Steering`` instead, and the model's name or an alias steers too.

A readout is dropped unless the setting ``openai_include_unmapped_response_data`` is on. Then a reply's
``provider_details["unmapped"]`` has it: ``["choice"]["readout"]`` of a whole one, and in a stream the same in the last
of ``["chunks"]``. On the responses route it is dropped with that setting too. ``provider_response_id`` is the reply's
id, everywhere.

A refusal is a ``ModelHTTPError`` with the server's error in ``body``.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.providers.vllm import VLLMProvider

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

CLIENT = "pydantic-ai"
CHAT = "/v1/chat/completions"
UNMAPPED = {"openai_include_unmapped_response_data": True}
READ = {"extra_body": {"steering": STEERING, "readout": READOUT}}
READ_PLAIN = {"extra_body": {"steering": [], "readout": READOUT}}
WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
PROVIDERS = pytest.mark.parametrize("provider", [VLLMProvider, OpenAIProvider])


def reply(
    served: Served,
    settings: dict[str, Any],
    name: str = MODEL,
    *,
    run: dict[str, Any] | None = None,
    stream: bool = False,
    provider: type = VLLMProvider,
    model_class: type = OpenAIChatModel,
) -> ModelResponse:
    """The answer of an agent to ``PROMPT``. ``settings`` are the model's, ``run`` the run's."""

    async def main() -> ModelResponse:
        access = provider(base_url=served.base_url, api_key=API_KEY)
        model = model_class(name, provider=access, settings={"max_tokens": NUM_TOKENS, "temperature": 0, **settings})
        agent = Agent(model)
        async with model:
            if not stream:
                return (await agent.run(PROMPT, model_settings=run)).response
            async with agent.run_stream(PROMPT, model_settings=run) as streamed:
                pieces = [piece async for piece in streamed.stream_text(delta=True, debounce_by=None)]
                assert "".join(pieces) == await streamed.get_output() == streamed.response.text
                return streamed.response

    return asyncio.run(main())


def kind(readout: dict[str, Any], served: Served) -> float:
    """The projection of a readout of all generated tokens."""
    assert readout["num_tokens"] == NUM_TOKENS - 1
    value: float = readout["projections"]["kind"][str(served.layer)]
    return value


@pytest.mark.cell(CLIENT, body="`extra_body`")
@PROVIDERS
@WAYS
def test_an_agent_is_steered_by_its_models_settings(
    served: Served, chat_texts: Texts, provider: type, stream: bool
) -> None:
    for settings, text in ((READ, chat_texts.steered), (READ_PLAIN, chat_texts.plain), ({}, chat_texts.plain)):
        assert reply(served, settings, provider=provider, stream=stream).text == text


def test_a_runs_extra_body_takes_the_place_of_the_models(served: Served, chat_texts: Texts) -> None:
    assert reply(served, {}, run=READ).text == chat_texts.steered
    assert reply(served, READ, run={"temperature": 0}).text == chat_texts.steered
    assert reply(served, READ, run={"extra_body": {"readout": READOUT}}).text == chat_texts.plain


@pytest.mark.cell(CLIENT, header="`extra_headers`", name="yes")
@WAYS
def test_a_header_and_the_models_name_steer(served: Served, chat_texts: Texts, stream: bool) -> None:
    by_header = {"extra_headers": {"X-Steering": f"kind:{ALPHA}"}}
    for settings, name in ((by_header, MODEL), ({}, f"{MODEL}@kind:{ALPHA}"), ({}, ALIAS)):
        assert reply(served, settings, name, stream=stream).text == chat_texts.steered


@pytest.mark.cell(CLIENT, whole='`provider_details["unmapped"]`, with a setting')
def test_a_setting_keeps_the_readout_of_a_whole_reply(served: Served) -> None:
    details = [reply(served, settings | UNMAPPED).provider_details for settings in (READ, READ_PLAIN)]
    steered, plain = (kind(one["unmapped"]["choice"]["readout"], served) for one in details)
    assert steered > plain + 1
    assert "projections" not in repr(reply(served, READ))


@pytest.mark.cell(CLIENT, stream="the same")
def test_a_setting_keeps_the_readout_of_a_stream(served: Served) -> None:
    details = [reply(served, settings | UNMAPPED, stream=True).provider_details for settings in (READ, READ_PLAIN)]
    steered, plain = (kind(one["unmapped"]["chunks"][-1]["choice"]["readout"], served) for one in details)
    assert steered > plain + 1
    assert "projections" not in repr(reply(served, READ, stream=True))


@pytest.mark.cell(CLIENT, id="`provider_response_id`")
@WAYS
def test_the_id_of_a_reply_brings_its_readout_back(served: Served, stream: bool) -> None:
    replies = [reply(served, settings, stream=stream) for settings in (READ, READ_PLAIN)]
    (steered,), (plain,) = (kept(served, one.provider_response_id) for one in replies)
    assert kind(steered, served) > kind(plain, served) + 1


@WAYS
def test_the_responses_route_is_steered_and_read_by_id_alone(served: Served, chat_texts: Texts, stream: bool) -> None:
    route = {"provider": OpenAIProvider, "model_class": OpenAIResponsesModel, "stream": stream}
    steered, plain = (reply(served, settings | UNMAPPED, **route) for settings in (READ, READ_PLAIN))
    assert (steered.text, plain.text) == (chat_texts.steered, chat_texts.plain)
    assert "projections" not in repr(steered)
    values = [kind(kept(served, one.provider_response_id)[0], served) for one in (steered, plain)]
    assert values[0] > values[1] + 1


@WAYS
def test_a_refusal_is_an_error_that_is_not_tried_again(served: Served, stream: bool) -> None:
    before = served.answers(CHAT, 400)
    with pytest.raises(ModelHTTPError, match="'nobody'") as refused:
        reply(served, {"extra_body": {"steering": REFUSED}}, stream=stream)
    assert (refused.value.status_code, refused.value.body["code"]) == (400, REFUSAL)
    assert served.answers(CHAT, 400) == before + 1
