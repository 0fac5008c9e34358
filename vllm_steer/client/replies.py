"""A server's replies as typed objects."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_steer.client.refusals import refusal_in_stream
from vllm_steer.errors import ReadoutUnavailable
from vllm_steer.schema.conditions import Crossing
from vllm_steer.schema.readout import ReadoutResult
from vllm_steer.schema.steering import Steering


@dataclass(frozen=True, slots=True)
class Choice:
    """One sample of a reply.

    Attributes:
        index: the server's number of the choice.
        text: the completion, or the message's content; empty if the message has none.
        finish_reason: as vLLM reports it.
        readout: ``None`` if none was requested, or if it failed.
        readout_error: why a requested readout is missing.
        body: the choice as the server sent it, with tool calls, log-probabilities and the like.
    """

    index: int
    text: str
    finish_reason: str | None
    readout: ReadoutResult | None
    readout_error: str | None
    body: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply. ``choices`` are in the server's order: all samples of the first prompt come first."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class TracePart:
    """Consecutive values of a trace.

    Attributes:
        start: index of the first value within the readout's span.
        values: (n,) float32, the projections of consecutive tokens onto the direction.
    """

    start: int
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Piece:
    """The addition of one chunk of a stream to one choice.

    Attributes:
        index: the server's number of the choice.
        text: the new text, often of one token; may be empty.
        trace: direction name -> the values that became known since the last piece. They lag behind the text; the last
            piece has the rest.
        finish_reason: set in the last piece of a choice, which has the readout too.
        readout, readout_error: as in ``Choice``.
    """

    index: int
    text: str
    trace: Mapping[str, TracePart]
    finish_reason: str | None
    readout: ReadoutResult | None
    readout_error: str | None


@dataclass(frozen=True, slots=True)
class StoredDirection:
    """A direction as a server lists it.

    Attributes:
        content_hash: its ETag, the SHA-256 (hex) of the float32 little-endian values.
        is_unit: see ``Direction.is_unit``.
    """

    name: str
    layer: int
    content_hash: str
    is_unit: bool


@dataclass(frozen=True, slots=True)
class ServerSteering:
    """Layers, limits, aliases and directions of a server.

    Attributes:
        version: version of the plugin.
        layers: hooked layers.
        max_alpha, max_entries, max_windows, max_directions: see ``SteerSettings``.
        aliases: model name -> the steering it applies.
        directions: the registered directions.
        body: the whole reply.
    """

    version: str
    layers: tuple[int, ...]
    max_alpha: float
    max_entries: int
    max_windows: int
    max_directions: int
    aliases: Mapping[str, tuple[Steering, ...]]
    directions: tuple[StoredDirection, ...]
    body: Mapping[str, Any] = field(repr=False)


class StreamEvents:
    """Splits the bytes of a server-sent event stream into its data fields, however the network splits the bytes.

    Only a line feed ends a line. ``str.splitlines``, and so httpx's ``iter_lines``, would also split at U+2028 and
    U+0085, which JSON strings may contain.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> Iterator[str]:
        """The data fields that ``received`` completes."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def pieces(event: str) -> Iterator[Piece]:
    """Parse one event of a completion or chat stream; the closing ``[DONE]`` has no pieces.

    Args:
        event: a data field of the stream.

    Raises:
        SteerError: the event is an error object.
    """
    if event == "[DONE]":
        return
    chunk = json.loads(event)
    if isinstance(chunk.get("error"), Mapping):
        raise refusal_in_stream(chunk["error"])
    for choice in chunk.get("choices", ()):
        delta = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        result, failure = _readout(choice)
        trace = {
            name: TracePart(part["start"], _float32(part["values"])) for name, part in choice.get("trace", {}).items()
        }
        yield Piece(choice["index"], delta or "", trace, choice.get("finish_reason"), result, failure)


def reply_of(body: Mapping[str, Any]) -> Reply:
    """Parse a completion or chat reply."""
    choices = []
    for choice in body["choices"]:
        text = choice["message"].get("content") if "message" in choice else choice.get("text")
        result, failure = _readout(choice)
        choices.append(Choice(choice["index"], text or "", choice.get("finish_reason"), result, failure, choice))
    return Reply(body["id"], body["model"], tuple(choices), body.get("usage") or {})


def kept_readouts(body: Mapping[str, Any]) -> list[ReadoutResult]:
    """Parse the reply of ``GET /v1/steering/readouts/{id}``, by the index of the choices.

    Raises:
        ReadoutUnavailable: a choice's readout failed; ``results`` has the others.
    """
    told = sorted(body["readouts"], key=lambda one: one["index"])
    parsed = [_readout(one) for one in told]
    if reasons := {(0, index): reason for index, (_, reason) in enumerate(parsed) if reason is not None}:
        raise ReadoutUnavailable(f"readouts failed: {reasons}", [result for result, _ in parsed], reasons)
    return [result for result, _ in parsed if result is not None]


def stored_directions(listed: list[dict[str, Any]]) -> tuple[StoredDirection, ...]:
    """Parse a server's list of directions."""
    return tuple(
        StoredDirection(one["name"], one["layer"], one["content_hash"], one.get("is_unit", False)) for one in listed
    )


def server_steering(body: Mapping[str, Any]) -> ServerSteering:
    """Parse the reply of ``GET /v1/steering``."""
    aliases = {
        name: tuple(Steering.from_json(entry) for entry in entries)
        for name, entries in (body.get("aliases") or {}).items()
    }
    return ServerSteering(
        version=body["version"],
        layers=tuple(body["layers"]),
        max_alpha=body["max_alpha"],
        max_entries=body["max_entries"],
        max_windows=body["max_windows"],
        max_directions=body["max_directions"],
        aliases=aliases,
        directions=stored_directions(body.get("directions", [])),
        body=body,
    )


def _readout(choice: Mapping[str, Any]) -> tuple[ReadoutResult | None, str | None]:
    told = choice.get("readout")
    if told is None:
        return None, None
    if "error" in told:
        return None, str(told["error"])
    projections = {
        name: {int(layer): math.nan if value is None else float(value) for layer, value in layers.items()}
        for name, layers in told.get("projections", {}).items()
    }
    mean, last = (
        {
            int(layer): np.frombuffer(base64.b64decode(packed), "<f4").astype(np.float32)
            for layer, packed in told.get(pool, {}).items()
        }
        for pool in ("mean", "last")
    )
    largest = {
        name: {
            int(layer): (math.nan if one[0] is None else float(one[0]), int(one[1])) for layer, one in layers.items()
        }
        for name, layers in told.get("max", {}).items()
    }
    num_tokens = int(told["num_tokens"])
    # over no tokens nothing tells the size of a row
    rows = {
        int(layer): (row := np.frombuffer(base64.b64decode(packed), "<f4").astype(np.float32)).reshape(
            num_tokens, row.size // max(num_tokens, 1)
        )
        for layer, packed in told.get("rows", {}).items()
    }
    trace = {name: _float32(part["values"]) for name, part in told.get("trace", {}).items()}
    # a server of before this field says nothing: it knew compared models only
    proof = told.get("proof", "parity")
    stopped, flags = told.get("stopped"), told.get("flags", ())
    return ReadoutResult(
        mean=mean,
        num_tokens=num_tokens,
        projections=projections,
        trace=trace,
        proof=proof,
        last=last,
        max=largest,
        stopped=None if stopped is None else Crossing(**stopped),
        flags=tuple(Crossing(**one) for one in flags),
        rows=rows,
        held=tuple(told.get("held", ())),
    ), None


def _float32(values: list[float | None]) -> npt.NDArray[np.float32]:
    return np.array([math.nan if value is None else value for value in values], np.float32)
