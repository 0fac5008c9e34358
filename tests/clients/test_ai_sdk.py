"""Vercel's AI SDK for Node, with its provider for servers of OpenAI's API: ``providerOptions`` steer.

A provider of ``createOpenAICompatible({name: "steered"})`` takes ``providerOptions: {steered: {steering, readout}}``.
Under any other name, ``openaiCompatible`` included, they are dropped and nothing warns of it. A provider's
``transformRequestBody`` may set the fields too; a header (``headers``) and the model's name or an alias steer as well.
A ``completionModel`` puts the words "user:" and "assistant:" into its prompt.

The readout of a whole reply is ``response.body.choices[0].readout``. A stream made with ``includeRawChunks: true`` has
it in its last part of the type "raw"; else the stream drops it. A provider with a ``metadataExtractor`` can put it into
``providerMetadata`` of both. ``response.id`` is the reply's id, in streams too.

A refusal is an ``APICallError`` with the server's message and ``data.error.code``. A stream does not raise it: it goes
to ``onError``, and into a part of the type "error".

Version 6 runs on Node 18 or newer; version 7 asks for Node 22.
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
    MODEL,
    NUM_TOKENS,
    PROMPT,
    READOUT,
    REFUSAL,
    REFUSED,
    STEERING,
    Served,
    Texts,
    ask,
    kept,
)

CLIENT = "AI SDK"
SCRIPT = Path(__file__).with_name("ai_sdk.mjs")
CHAT = "/v1/chat/completions"
WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None and "VLLM_STEER_REQUIRE_NODE" not in os.environ,
    reason="there is no node, and VLLM_STEER_REQUIRE_NODE is not set",
)


def call(steering: list[dict[str, Any]] | None = None, name: str = "steered", **fields: Any) -> dict[str, Any]:
    """A greedy call; with ``steering`` also a readout is asked for, under ``providerOptions[name]``."""
    asked = {"model": MODEL, "prompt": PROMPT, "maxOutputTokens": NUM_TOKENS, "temperature": 0, **fields}
    if steering is not None:
        asked["providerOptions"] = {name: {"steering": steering, "readout": READOUT}}
    return asked


def node(served: Served, *calls: dict[str, Any]) -> list[dict[str, Any]]:
    """The package's results for ``calls``, made concurrently."""
    asked = json.dumps({"baseURL": served.base_url, "apiKey": API_KEY, "calls": calls})
    ran = subprocess.run(["node", SCRIPT], input=asked, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    outcomes: list[dict[str, Any]] = json.loads(ran.stdout)
    return outcomes


def kind(readout: dict[str, Any], served: Served) -> float:
    """The projection of a readout of all generated tokens."""
    assert readout["num_tokens"] == NUM_TOKENS - 1
    value: float = readout["projections"]["kind"][str(served.layer)]
    return value


@pytest.mark.cell(CLIENT, body="`providerOptions`")
@WAYS
def test_a_text_is_steered_by_options_under_the_providers_name(served: Served, chat_texts: Texts, stream: bool) -> None:
    replies = node(served, *(call(steering, stream=stream) for steering in (STEERING, [], None)))
    assert [reply["text"] for reply in replies] == [chat_texts.steered, chat_texts.plain, chat_texts.plain]


def test_a_bare_text_is_steered(served: Served) -> None:
    prompt = f"user:\n{PROMPT}\n\nassistant:\n"  # as the package writes it
    expected = [ask(served, "/v1/completions", prompt=prompt, steering=spec) for spec in (STEERING, [])]
    replies = node(served, *(call(steering, completion=True) for steering in (STEERING, [])))
    assert [reply["text"] for reply in replies] == [answer["choices"][0]["text"] for answer in expected]
    steered, plain = (kind(reply["response"]["body"]["choices"][0]["readout"], served) for reply in replies)
    assert steered > plain + 1


@pytest.mark.parametrize("name", ["openaiCompatible", "vllm"])
def test_options_under_another_name_are_dropped_without_a_warning(served: Served, chat_texts: Texts, name: str) -> None:
    [reply] = node(served, call(STEERING, name=name))
    assert (reply["text"], reply["warnings"]) == (chat_texts.plain, [])


def test_a_provider_that_adds_fields_to_bodies_steers_all_its_calls(served: Served, chat_texts: Texts) -> None:
    whole, streamed = node(served, *(call(body={"steering": STEERING}, stream=stream) for stream in (False, True)))
    assert whole["text"] == streamed["text"] == chat_texts.steered


@pytest.mark.cell(CLIENT, header="`headers`", name="yes")
@WAYS
def test_a_header_and_the_models_name_steer(served: Served, chat_texts: Texts, stream: bool) -> None:
    by_header = call(headers={"X-Steering": f"kind:{ALPHA}"}, stream=stream)
    by_name = [call(model=name, stream=stream) for name in (f"{MODEL}@kind:{ALPHA}", ALIAS)]
    assert [reply["text"] for reply in node(served, by_header, *by_name)] == [chat_texts.steered] * 3


@pytest.mark.cell(CLIENT, whole="`response.body`")
def test_the_body_of_a_whole_reply_has_the_readout(served: Served) -> None:
    steered, plain = (
        kind(reply["response"]["body"]["choices"][0]["readout"], served)
        for reply in node(served, call(STEERING), call([]))
    )
    assert steered > plain + 1


@pytest.mark.cell(CLIENT, stream="raw parts, with `includeRawChunks`")
def test_raw_parts_of_a_stream_have_the_readout(served: Served) -> None:
    asked = [call(steering, stream=True, includeRawChunks=True) for steering in (STEERING, [])]
    raw = [[part for part in reply["parts"] if part["type"] == "raw"] for reply in node(served, *asked)]
    steered, plain = (kind(parts[-1]["rawValue"]["choices"][0]["readout"], served) for parts in raw)
    assert steered > plain + 1


@WAYS
def test_an_extractor_puts_the_readout_into_the_providers_metadata(served: Served, stream: bool) -> None:
    asked = [call(steering, stream=stream, extract=True) for steering in (STEERING, [])]
    steered, plain = (kind(reply["providerMetadata"]["steered"]["readout"], served) for reply in node(served, *asked))
    assert steered > plain + 1


@pytest.mark.cell(CLIENT, id="`response.id`")
@WAYS
def test_the_id_of_a_reply_brings_its_readout_back(served: Served, stream: bool) -> None:
    replies = node(served, *(call(steering, stream=stream) for steering in (STEERING, [])))
    assert not stream or "projections" not in repr(replies)
    (steered,), (plain,) = (kept(served, reply["response"]["id"]) for reply in replies)
    assert kind(steered, served) > kind(plain, served) + 1


@WAYS
def test_a_refusal_is_an_error_that_is_not_tried_again(served: Served, stream: bool) -> None:
    before = served.answers(CHAT, 400)
    [refused] = node(served, call(REFUSED, stream=stream))
    assert (refused["raised"], refused["status"], refused["code"]) == ("AI_APICallError", 400, REFUSAL)
    assert "'nobody'" in refused["message"]
    assert served.answers(CHAT, 400) == before + 1
