"""How to ask each route that generates for one greedy answer, and where its replies hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.server.conftest import ALIAS_ALPHA
from vllm_steer.server.inbound.steered_routes import (
    CHAT,
    CHAT_BATCH,
    COHERE,
    COMPLETIONS,
    INVOCATIONS,
    MESSAGES,
    RESPONSES,
    STEERED,
    TOKENS,
)

SCORING = "/generative_scoring"
PROMPT = "Once upon a time there was"
MESSAGES_BODY = [{"role": "user", "content": PROMPT}]
GENERATED = 8
STRONG = [{"direction": "kind", "alpha": ALIAS_ALPHA}]
READ = {"span": "generated", "project": ["kind"], "trace": ["kind"]}

_SHORT = {"max_tokens": GENERATED, "temperature": 0}
EXACT = {**_SHORT, "ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True)
class Use:
    """How to ask a route that generates, and how to read its answer.

    Attributes:
        body: a body that asks for a greedy answer to ``PROMPT``.
        said: reads the answer off a reply: token ids where the route gives them, else the text.
        streamed: does the same for the events of a stream; None where the route cannot stream.
        is_chat: its prompt goes through the chat template.
    """

    body: dict[str, Any]
    said: Callable[[dict[str, Any]], object]
    streamed: Callable[[list[dict[str, Any]]], object] | None = None
    is_chat: bool = True


def _ids(reply: dict[str, Any]) -> object:
    return [choice["token_ids"] for choice in reply["choices"]]


def _streamed_ids(events: list[dict[str, Any]]) -> object:
    choices = [choice for event in events for choice in event.get("choices", ())]
    return [[token for choice in choices for token in choice.get("token_ids") or ()]]


def _responses_text(events: list[dict[str, Any]]) -> object:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def _messages_text(events: list[dict[str, Any]]) -> object:
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    return "".join(delta.get("text", "") for delta in deltas)


def _cohere_text(events: list[dict[str, Any]]) -> object:
    deltas = [event["delta"] for event in events if event["type"] == "content-delta"]
    return "".join(delta["message"]["content"]["text"] for delta in deltas)


USES = {
    CHAT: Use({"messages": MESSAGES_BODY, **EXACT}, _ids, _streamed_ids),
    CHAT_BATCH: Use({"messages": [MESSAGES_BODY], **EXACT}, _ids),
    COMPLETIONS: Use({"prompt": PROMPT, **EXACT}, _ids, _streamed_ids, is_chat=False),
    RESPONSES: Use(
        {"input": PROMPT, "temperature": 0, "max_output_tokens": GENERATED},
        lambda reply: reply["output"][0]["content"][0]["text"],
        _responses_text,
    ),
    MESSAGES: Use({"messages": MESSAGES_BODY, **_SHORT}, lambda reply: reply["content"][0]["text"], _messages_text),
    INVOCATIONS: Use({"messages": MESSAGES_BODY, **EXACT}, _ids, _streamed_ids),
    TOKENS: Use({"sampling_params": {**_SHORT, "ignore_eos": True}}, _ids, _streamed_ids, is_chat=False),
    COHERE: Use(
        {"messages": MESSAGES_BODY, **_SHORT}, lambda reply: reply["message"]["content"][0]["text"], _cohere_text
    ),
    SCORING: Use(
        {"query": PROMPT, "items": ["kind", "cold"], "label_token_ids": [500, 600]},
        lambda reply: [one["score"] for one in reply["data"]],
        is_chat=False,
    ),
}
"""``/v1/systemone`` and ``/v1/decisions`` are missing: the tiny model cannot decide, so they answer 501."""

ROUTES = pytest.mark.parametrize("path", USES)
READING = pytest.mark.parametrize("path", [path for path in USES if STEERED[path].reads])


def post(server: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    """Ask ``path`` of the model "tiny" for a greedy answer, with ``fields`` in the body too."""
    return server.post(path, json={"model": "tiny", **body_for(server, path), **fields})


def body_for(server: httpx.Client, path: str) -> dict[str, Any]:
    """A body that asks ``path`` for a greedy answer to ``PROMPT``."""
    if path != TOKENS:
        return USES[path].body
    tokens = server.post("/tokenize", json={"model": "tiny", "prompt": PROMPT}).json()["tokens"]
    return {**USES[path].body, "token_ids": tokens}


def said(path: str, reply: httpx.Response) -> object:
    """The answer in a successful reply, as ``Use.said`` reads it."""
    assert reply.status_code == 200, reply.text
    return USES[path].said(reply.json())


def readout_of(reply: httpx.Response) -> dict[str, Any]:
    """The one readout of a whole reply."""
    fields = reply.json()
    found: dict[str, Any] = fields["readout"] if "readout" in fields else fields["choices"][0]["readout"]
    return found


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a successful stream, without its final ``[DONE]``."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
