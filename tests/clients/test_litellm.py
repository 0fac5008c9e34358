"""LiteLLM's Python package: unknown fields go into ``extra_body``.

A chat's readout is ``choices[i].provider_specific_fields["readout"]``, a bare text's is ``choices[i].readout``. In a
streamed chat it is ``choices[0].readout`` of the last chunk with text, one before the chunk with the finish reason.
Where a stream ends in a token without text, such as the end of the text, LiteLLM drops the server's last chunk and the
readout with it; in a streamed bare text it always does. ``/v1/steering/readouts/{id}`` gives the readout by the id of
the reply, which the chunks of a stream have too.

The provider "openai" keeps a refusal's code in ``code``; "hosted_vllm" has it only in the message.

In a Router's model list, put ``steering`` directly into a deployment's ``litellm_params``. In an ``extra_body`` there
it is lost for every request that brings an ``extra_body`` of its own.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import litellm
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

CLIENT = "LiteLLM"
CHAT = "/v1/chat/completions"
GREEDY = {"max_tokens": NUM_TOKENS, "temperature": 0}
PROVIDERS = ["hosted_vllm", "openai"]

# pydantic warns of LiteLLM's own types when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning")


@pytest.fixture(params=PROVIDERS)
def access(request: pytest.FixtureRequest, served: Served) -> dict[str, Any]:
    """Arguments that name the served model for one of LiteLLM's two providers, with default retries."""
    return {"model": f"{request.param}/{MODEL}", "api_base": served.base_url, "api_key": API_KEY}


def chat(access: dict[str, Any], **extra_body: Any) -> Any:
    return litellm.completion(**access, **GREEDY, messages=MESSAGES, extra_body=extra_body).choices[0]


@pytest.mark.cell(CLIENT, body="`extra_body`, or a keyword of its own")
def test_a_chat_is_steered_by_extra_body(access: dict[str, Any], chat_texts: Texts) -> None:
    assert chat(access, steering=STEERING).message.content == chat_texts.steered
    assert chat(access, steering=[]).message.content == chat_texts.plain
    assert chat(access).message.content == chat_texts.plain
    reply = litellm.completion(**access, **GREEDY, messages=MESSAGES, steering=STEERING)
    assert reply.choices[0].message.content == chat_texts.steered


def test_a_text_is_steered_and_read_by_extra_body(access: dict[str, Any], completion_texts: Texts) -> None:
    for steering, text in ((STEERING, completion_texts.steered), ([], completion_texts.plain)):
        body = {"steering": steering, "readout": READOUT}
        [choice] = litellm.text_completion(**access, **GREEDY, prompt=PROMPT, extra_body=body).choices
        assert choice.text == text
        assert choice.readout["num_tokens"] == NUM_TOKENS - 1


@pytest.mark.cell(CLIENT, whole="`choice.provider_specific_fields`")
def test_a_readout_comes_with_the_choice(access: dict[str, Any], served: Served) -> None:
    choices = [chat(access, steering=spec, readout=READOUT) for spec in ([], STEERING)]
    plain, steered = (choice.provider_specific_fields["readout"] for choice in choices)
    layer = str(served.layer)
    assert plain["num_tokens"] == steered["num_tokens"] == NUM_TOKENS - 1
    assert steered["projections"]["kind"][layer] > plain["projections"]["kind"][layer] + 1


@pytest.mark.cell(CLIENT, id="`reply.id`")
def test_the_id_of_a_reply_brings_its_projection_back(access: dict[str, Any], served: Served) -> None:
    body = {"steering": STEERING, "readout": READOUT}
    whole = litellm.completion(**access, **GREEDY, messages=MESSAGES, extra_body=body)
    chunks = list(litellm.completion(**access, **GREEDY, messages=MESSAGES, stream=True, extra_body=body))
    texts = list(litellm.text_completion(**access, **GREEDY, prompt=PROMPT, stream=True, extra_body=body))
    for reply_id in (whole.id, chunks[-1].id, texts[-1].id):
        (readout,) = kept(served, reply_id)
        assert readout["num_tokens"] == NUM_TOKENS - 1
        assert readout["projections"]["kind"][str(served.layer)] > 1


@pytest.mark.cell(CLIENT, header="`extra_headers`", name="yes")
def test_entries_in_the_models_name_or_a_header_steer(access: dict[str, Any], chat_texts: Texts) -> None:
    named = {**access, "model": f"{access['model']}@kind:{ALPHA}"}
    assert chat(named).message.content == chat_texts.steered
    by_header = {**access, "extra_headers": {"X-Steering": f"kind:{ALPHA}"}}
    assert chat(by_header).message.content == chat_texts.steered


@pytest.mark.cell(CLIENT, name="yes")
def test_an_alias_is_a_model(access: dict[str, Any], chat_texts: Texts) -> None:
    access["model"] = access["model"].replace(MODEL, ALIAS)
    assert chat(access).message.content == chat_texts.steered


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_refusal_is_a_bad_request_that_is_not_tried_again(
    access: dict[str, Any], served: Served, stream: bool
) -> None:
    before = served.answers(CHAT, 400)
    with pytest.raises(litellm.BadRequestError, match="'nobody'") as refused:
        litellm.completion(**access, **GREEDY, messages=MESSAGES, stream=stream, extra_body={"steering": REFUSED})
    assert REFUSAL in (refused.value.code or refused.value.message)
    assert served.answers(CHAT, 400) == before + 1


@pytest.mark.cell(CLIENT, stream="`choice.readout`, last chunk with text")
def test_a_stream_is_steered(access: dict[str, Any], chat_texts: Texts) -> None:
    for steering, text in ((STEERING, chat_texts.steered), ([], chat_texts.plain)):
        body = {"steering": steering, "readout": READOUT}
        chunks = list(litellm.completion(**access, **GREEDY, messages=MESSAGES, stream=True, extra_body=body))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        [readout] = [chunk.choices[0].readout for chunk in chunks if hasattr(chunk.choices[0], "readout")]
        assert readout["num_tokens"] == NUM_TOKENS - 1


def test_the_async_functions_are_steered_beside_plain_requests(access: dict[str, Any], chat_texts: Texts) -> None:
    specs: list[list[dict[str, Any]]] = [STEERING, []] * 4

    async def text(steering: list[dict[str, Any]], stream: bool) -> str:
        fields = {**access, **GREEDY, "messages": MESSAGES, "extra_body": {"steering": steering}}
        reply: Any = await litellm.acompletion(**fields, stream=stream)
        if not stream:
            return str(reply.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def main() -> list[str]:
        return await asyncio.gather(*(text(spec, stream) for spec in specs for stream in (False, True)))

    texts = [chat_texts.steered if spec else chat_texts.plain for spec in specs for _ in range(2)]
    assert asyncio.run(main()) == texts


def test_a_router_keeps_a_deployment_that_refused(served: Served, chat_texts: Texts) -> None:
    """A misspelt alias is a 404, for which a Router does cool a deployment down: so the test can see a cooldown."""

    def deployment(group: str, model: str, name: str, **params: Any) -> dict[str, Any]:
        access = {"model": model, "api_base": served.base_url, "api_key": API_KEY, **params}
        return {"model_name": group, "litellm_params": access, "model_info": {"id": name}}

    router = litellm.Router(
        model_list=[
            *(deployment("two", f"{provider}/{MODEL}", provider) for provider in PROVIDERS),
            deployment("alias", f"hosted_vllm/{ALIAS}", "alias"),
            deployment("steered", f"hosted_vllm/{MODEL}", "steered", steering=STEERING),
            deployment("misspelt", f"hosted_vllm/{ALIAS}s", "misspelt"),
        ]
    )

    def ask(group: str, **extra_body: Any) -> Any:
        return router.completion(group, messages=MESSAGES, **GREEDY, extra_body=extra_body).choices[0].message.content

    for _ in range(10):  # one deployment gets five; from there on a Router considers its failure rate
        before = served.answers(CHAT, 400)
        with pytest.raises(litellm.BadRequestError, match="'nobody'"):
            ask("two", steering=REFUSED)
        assert served.answers(CHAT, 400) == before + 1
    with pytest.raises(litellm.NotFoundError, match=ALIAS):
        ask("misspelt")
    assert resting(router) == ["misspelt"]
    assert ask("two") == chat_texts.plain
    assert ask("two", steering=STEERING) == ask("alias") == ask("steered", top_k=0) == chat_texts.steered


def resting(router: litellm.Router) -> list[str]:
    """Wait until the router cools some deployments down, and return them."""
    names = router.registry().names(kind="ids")
    deadline = time.monotonic() + 10
    while not (found := router.health().cooldowns.get_active_cooldowns(names, None)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [name for name, _ in found]
