"""The requests that both clients send."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import MalformedSpec, NotConfigured
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.steering import Steering
from vllm_steer.schema.wire import STEERED_HEADER

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
STEERING = "/v1/steering"
DIRECTIONS = f"{STEERING}/directions"
ALIASES = f"{STEERING}/aliases"
READOUTS = f"{STEERING}/readouts"

Messages = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request; ``asks`` says whether its own body asks for steering or a readout."""

    method: str
    path: str
    json: Mapping[str, Any] | None = None
    content: bytes | None = None
    params: Mapping[str, int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    asks: bool = False


def server_root(base_url: str) -> str:
    """The server's address without the trailing ``/v1`` that OpenAI clients need."""
    return base_url.rstrip("/").removesuffix("/v1")


def key_headers(api_key: str | None) -> dict[str, str]:
    """The header for vLLM's ``--api-key``; empty without a key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def chat_call(
    model: str,
    messages: Messages,
    steering: Sequence[Steering] | None,
    readout: Readout | None,
    options: Mapping[str, Any],
    *,
    stream: bool = False,
) -> Call:
    """Build a chat request; a string becomes one user message.

    Raises:
        MalformedSpec: an option repeats a field that is written here.
    """
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _generation(CHAT, {"model": model, "messages": said}, steering, readout, options, stream)


def completion_call(
    model: str,
    prompt: str | Sequence[str],
    steering: Sequence[Steering] | None,
    readout: Readout | None,
    options: Mapping[str, Any],
    *,
    stream: bool = False,
) -> Call:
    """Build a completion request for one prompt or several.

    Raises:
        MalformedSpec: an option repeats a field that is written here.
    """
    asked = prompt if isinstance(prompt, str) else list(prompt)
    return _generation(COMPLETIONS, {"model": model, "prompt": asked}, steering, readout, options, stream)


def _generation(
    path: str,
    body: dict[str, Any],
    steering: Sequence[Steering] | None,
    readout: Readout | None,
    options: Mapping[str, Any],
    stream: bool,
) -> Call:
    if steering is not None:  # an empty list turns the server's default off
        body["steering"] = [entry.to_json() for entry in steering]
    if readout is not None:
        body["readout"] = readout.to_json()
    if stream:
        body["stream"] = True
    if taken := sorted(set(body) & set(options)):
        raise MalformedSpec(f"options have {taken[0]!r}, which the client writes itself; give it as an argument.")
    return Call("POST", path, json={**body, **options}, asks=bool(steering) or readout is not None)


def check_seen(call: Call, reply: httpx.Response) -> None:
    """Check that the server applied steering and readout; a server without the plugin ignores unknown fields.

    Raises:
        NotConfigured: the call asks for steering or a readout, and the reply does not have the plugin's header.
    """
    if call.asks and STEERED_HEADER not in reply.headers:
        raise NotConfigured(
            f"{reply.url} answered without looking at the request's steering or readout; allowed: a server with this "
            "plugin. Start it with vllm-steer serve, or let the proxy in front of it pass on the header "
            f"{STEERED_HEADER}."
        )


def put_call(name: str, directions: Sequence[Direction], if_match: str | None, *, only_new: bool) -> Call:
    """Build a request that registers or replaces directions of one name.

    Raises:
        MalformedSpec: there are no directions, or one has another name.
    """
    if not directions or any(direction.name != name for direction in directions):
        raise MalformedSpec(
            f"directions named {sorted({direction.name for direction in directions})} were put under {name!r}; "
            f"allowed: one or more named {name!r}. Make Direction({name!r}, ...)."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "directions.safetensors"
        save_directions(file, directions)
        content = file.read_bytes()
    headers = {**_condition(if_match), "Content-Type": "application/octet-stream"}
    if only_new:
        headers["If-None-Match"] = "*"
    return Call("PUT", _path_of(name), content=content, headers=headers)


def get_call(name: str, layer: int | None) -> Call:
    """Build a request that fetches the directions of one name, at every layer or at one."""
    return Call("GET", _path_of(name), params=_at(layer))


def delete_call(name: str, layer: int | None, if_match: str | None) -> Call:
    """Build a request that removes the directions of one name, at every layer or at one."""
    return Call("DELETE", _path_of(name), params=_at(layer), headers=_condition(if_match))


def put_alias_call(alias: str, entries: Sequence[Steering]) -> Call:
    """Build a request that makes a model name stand for a steering."""
    return Call("PUT", f"{ALIASES}/{quote(alias, safe='')}", json={"steering": [one.to_json() for one in entries]})


def delete_alias_call(alias: str) -> Call:
    """Build a request that removes an alias."""
    return Call("DELETE", f"{ALIASES}/{quote(alias, safe='')}")


def readouts_call(reply_id: str) -> Call:
    """Build a request for the readouts of a finished reply."""
    return Call("GET", f"{READOUTS}/{quote(reply_id, safe='')}")


def directions_in(content: bytes) -> list[Direction]:
    """Read the directions of a safetensors body.

    Raises:
        BadDirectionFile, BadVector: as ``load_directions``.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "directions.safetensors"
        file.write_bytes(content)
        return load_directions(file)


def etag_of(reply: httpx.Response) -> str:
    """The ETag of a reply, without its quotes."""
    return str(reply.headers["ETag"]).strip('"')


def _path_of(name: str) -> str:
    return f"{DIRECTIONS}/{quote(name, safe='')}"


def _at(layer: int | None) -> dict[str, int]:
    return {} if layer is None else {"layer": layer}


def _condition(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": f'"{etag}"'}
