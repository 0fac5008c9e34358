"""OpenAI's package for Node: unknown fields go into the body itself and come back as properties.

The header ``X-Steering`` goes into ``headers`` of a call's options; the model's name and aliases steer too.

A readout is `choices[i].readout`; in a stream, of the chunk that ends the choice. The helpers
``chat.completions.stream``, ``runTools`` and ``responses.stream`` keep it in what they give at the end. The first of
them keeps the last value of a field: of a trace beside the readout it has only the last piece, the readout has the
whole. ``reply.id`` brings a readout back on all routes.

``runTools`` without ``stream`` raises ``LengthFinishReasonError`` for an answer that ended at ``max_tokens``, with no
completion in it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

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

CLIENT = "openai for Node"
SCRIPT = Path(__file__).with_name("openai_node.mjs")
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None and "VLLM_STEER_REQUIRE_NODE" not in os.environ,
    reason="there is no node, and VLLM_STEER_REQUIRE_NODE is not set",
)


def chat(model: str = MODEL, **fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": model, "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0, **fields}
    return "chat", body


def node(served: Served, *calls: tuple[Any, ...]) -> list[Any]:
    """The package's results for ``calls``, made concurrently."""
    asked = json.dumps({"baseURL": served.base_url, "apiKey": API_KEY, "calls": calls})
    ran = subprocess.run(["node", SCRIPT], input=asked, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    outcomes: list[Any] = json.loads(ran.stdout)
    return outcomes


def text_of(reply: dict[str, Any]) -> str:
    """The text of a chat."""
    assert "choices" in reply, reply
    text: str = reply["choices"][0]["message"]["content"]
    return text


@pytest.mark.cell(CLIENT, body="a field of the body")
def test_a_chat_is_steered_by_a_field_of_its_body(served: Served, chat_texts: Texts) -> None:
    replies = node(served, chat(steering=STEERING), chat(steering=[]), chat())
    assert [text_of(reply) for reply in replies] == [chat_texts.steered, chat_texts.plain, chat_texts.plain]


def test_a_completion_is_steered_by_a_field_of_its_body(served: Served, completion_texts: Texts) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    replies = node(served, ("completions", {**body, "steering": STEERING}), ("completions", body))
    texts = [reply["choices"][0]["text"] for reply in replies]
    assert texts == [completion_texts.steered, completion_texts.plain]


def test_a_response_is_steered_and_read_by_fields_of_its_body(served: Served, chat_texts: Texts) -> None:
    body = {"model": MODEL, "input": PROMPT, "max_output_tokens": NUM_TOKENS, "temperature": 0, "readout": READOUT}
    replies = node(served, ("responses", {**body, "steering": STEERING}), ("responses", body))
    assert [reply["output_text"] for reply in replies] == [chat_texts.steered, chat_texts.plain]
    assert [reply["readout"]["num_tokens"] for reply in replies] == [NUM_TOKENS - 1] * 2


@pytest.mark.cell(CLIENT, whole="`choice.readout`")
def test_a_readout_comes_with_the_choice(served: Served) -> None:
    replies = node(served, *(chat(steering=spec, readout=READOUT) for spec in ([], STEERING)))
    plain, steered = (reply["choices"][0]["readout"] for reply in replies)
    layer = str(served.layer)
    assert plain["num_tokens"] == steered["num_tokens"] == NUM_TOKENS - 1
    assert steered["projections"]["kind"][layer] > plain["projections"]["kind"][layer] + 1


@pytest.mark.cell(CLIENT, header="`headers`", name="yes")
def test_a_header_and_the_models_name_steer(served: Served, chat_texts: Texts) -> None:
    by_header = (*chat(), {"headers": {"X-Steering": f"kind:{ALPHA}"}})
    replies = node(served, by_header, chat(f"{MODEL}@kind:{ALPHA}"), chat(ALIAS))
    assert [text_of(reply) for reply in replies] == [chat_texts.steered] * 3


@pytest.mark.cell(CLIENT, id="`reply.id`")
def test_the_id_of_a_reply_brings_its_readout_back(served: Served) -> None:
    read = chat(steering=STEERING, readout=READOUT)
    body = {"model": MODEL, "input": PROMPT, "max_output_tokens": NUM_TOKENS, "temperature": 0, "readout": READOUT}
    calls = (read, chat(readout=READOUT, stream=True), ("responses", body), ("responsesHelper", body))
    whole, chunks, response, helped = node(served, *calls)
    assert kept(served, whole["id"]) == [whole["choices"][0]["readout"]]
    assert kept(served, chunks[0]["id"]) == [chunks[-1]["choices"][0]["readout"]]
    assert [kept(served, reply["id"]) for reply in (response, helped)] == [[response["readout"]], [helped["readout"]]]
    assert helped["readout"]["num_tokens"] == NUM_TOKENS - 1


def test_an_alias_is_a_model(served: Served, chat_texts: Texts) -> None:
    models, reply = node(served, ("models", {}), chat(model=ALIAS))
    assert ALIAS in [model["id"] for model in models]
    assert text_of(reply) == chat_texts.steered


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_refusal_is_a_bad_request_that_is_not_tried_again(served: Served, stream: bool) -> None:
    before = served.answers(CHAT, 400)
    [refused] = node(served, chat(steering=REFUSED, stream=stream))
    assert (refused["raised"], refused["status"], refused["code"]) == ("BadRequestError", 400, REFUSAL)
    assert "'nobody'" in refused["message"]
    assert served.answers(CHAT, 400) == before + 1


@pytest.mark.cell(CLIENT, stream="`choice.readout`, last chunk; helpers keep it")
def test_a_stream_is_steered(served: Served, chat_texts: Texts) -> None:
    asked = [chat(steering=spec, readout=READOUT, stream=True) for spec in (STEERING, [])]
    for chunks, text in zip(node(served, *asked), (chat_texts.steered, chat_texts.plain), strict=True):
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
        assert chunks[-1]["choices"][0]["readout"]["num_tokens"] == NUM_TOKENS - 1


@pytest.mark.cell(CLIENT, stream="`choice.readout`, last chunk; helpers keep it")
def test_the_stream_helper_ends_with_the_text_and_the_readout(served: Served, chat_texts: Texts) -> None:
    asked = [("helper", chat(steering=spec, readout=READOUT)[1]) for spec in (STEERING, [])]
    for final, text in zip(node(served, *asked), (chat_texts.steered, chat_texts.plain), strict=True):
        assert text_of(final) == text
        assert final["choices"][0]["readout"]["num_tokens"] == NUM_TOKENS - 1
        assert kept(served, final["id"]) == [final["choices"][0]["readout"]]


@pytest.mark.cell(CLIENT, stream="`choice.readout`, last chunk; helpers keep it")
def test_run_tools_ends_with_the_text_and_the_readout(served: Served, chat_texts: Texts) -> None:
    body = chat(steering=STEERING, readout=READOUT)[1]
    end = chat_texts.steered[-4:]
    calls = ({**body, "stream": True}, {**body, "stop": end}, body)
    streamed, stopped, at_length = node(served, *(("runTools", asked) for asked in calls))
    assert text_of(streamed) == chat_texts.steered
    assert text_of(stopped) == chat_texts.steered.partition(end)[0]
    for final in (streamed, stopped):
        assert kept(served, final["id"]) == [final["choices"][0]["readout"]]
        assert final["choices"][0]["readout"]["projections"]["kind"][str(served.layer)] > 10
    assert at_length["raised"] == "LengthFinishReasonError"
