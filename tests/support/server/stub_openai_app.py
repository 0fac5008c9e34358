"""Stubs of vLLM's server and of admission, for tests of the middleware in front of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from vllm_steer.engine.front.http_exchange import Exchange, current_exchange
from vllm_steer.errors import LayerNotHooked, UnknownDirection
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.server.inbound.model_names import ModelNames
from vllm_steer.server.middleware import SERVED, Served, SteerMiddleware
from vllm_steer.server.readouts.kept_readouts import KeptReadouts
from vllm_steer.server.readouts.routes import KEPT
from vllm_steer.settings import SteerSettings

BASE_MODEL = "base"


class StubBook:
    """Registered directions: the layers of each name."""

    def __init__(self, layers: dict[str, list[int]]) -> None:
        self._layers = layers

    def current(self) -> StubBook:
        """This book; it never changes."""
        return self

    def layers_of(self, name: str) -> dict[int, str]:
        """Each layer of a name -> the name.

        Raises:
            UnknownDirection: the name is not registered.
        """
        if name not in self._layers:
            raise UnknownDirection(f"no direction is named {name!r}")
        return dict.fromkeys(self._layers[name], name)


class StubChecker:
    """An admission that knows three names and two hooked layers, and checks nothing else."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SteerSettings.parse({"layers": [1, 2], **settings})
        self.registry = StubBook({"kind": [2], "calm": [1, 2, 9], "far": [9]})

    def check(self, spec: RequestSpec) -> None:
        """Refuse unknown names and readouts of layers without a hook.

        Raises:
            UnknownDirection: an entry's name is not registered.
            LayerNotHooked: the readout names a layer without a hook.
        """
        for entry in spec.entries:
            self.registry.layers_of(entry.direction)
        if spec.readout is not None and not set(spec.readout.layers) <= set(self.settings.layers):
            raise LayerNotHooked(f"layers {list(spec.readout.layers)} are not all hooked")


def model_names(checker: StubChecker) -> ModelNames:
    """The names of a server with the checker's settings."""
    settings = checker.settings
    return ModelNames(BASE_MODEL, settings.served_aliases, settings.steering_in_model_names)


@dataclass
class StubServer:
    """An ASGI application that records the last request and sends a given answer.

    Attributes:
        chunks: the body of its answer, one message each.
        status, content_type: the head of its answer.
        engine: does to the exchange what the engine would do before the answer is sent.
        steers: whether it admits a request that asks something of the plugin.
        body, headers, exchange: of the last request; the body is None before the first one.
    """

    chunks: Sequence[bytes] = (b"{}",)
    status: int = 200
    content_type: str = "application/json"
    engine: Callable[[Exchange], None] = lambda exchange: None
    steers: bool = True
    body: bytes | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    exchange: Exchange | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body, self.headers, self.exchange = b"", dict(scope["headers"]), current_exchange.get()
        while True:
            message = await receive()
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if self.exchange is not None:
            self.exchange.is_applied = self.steers and not self.exchange.whole.is_empty
            self.engine(self.exchange)
        length = (b"content-length", str(sum(map(len, self.chunks))).encode())
        head = [(b"content-type", self.content_type.encode())]
        if self.content_type == "application/json":
            head.append(length)
        await send({"type": "http.response.start", "status": self.status, "headers": head})
        for index, chunk in enumerate(self.chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": index + 1 < len(self.chunks)})


@dataclass(frozen=True)
class Reply:
    """What a client received: the status, the headers and the body's chunks."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        """The chunks joined."""
        return b"".join(self.chunks)

    def json(self) -> Any:
        """The body as JSON; its length must be that of the header."""
        assert int(self.headers["content-length"]) == len(self.body)
        return json.loads(self.body)


def request(
    stub: StubServer,
    checker: StubChecker | None,
    path: str,
    body: object = b"",
    *,
    method: str = "POST",
    key: str | None = None,
    chunk_size: int | None = None,
    more: Mapping[str, str] | None = None,
    kept: KeptReadouts | None = None,
) -> Reply:
    """Send one request through the middleware to the stub.

    Args:
        stub: answers it.
        checker: admission; None for a server without hooks.
        path: the route.
        body: bytes; anything else is sent as JSON.
        method: the HTTP method.
        key: the API key.
        chunk_size: bytes of one message of the body.
        more: further headers.
        kept: where the server keeps readouts.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = chunk_size or max(1, len(data))
    parts = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    headers = [(b"content-length", str(len(data)).encode())]
    if key is not None:
        headers.append((b"authorization", f"Bearer {key}".encode()))
    headers += [(name.encode(), value.encode()) for name, value in (more or {}).items()]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    sent = exchange_messages(stub, checker, path, messages, method=method, headers=headers, kept=kept)
    start, *rest = sent
    assert start["type"] == "http.response.start"
    assert all(message["type"] == "http.response.body" for message in rest)
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], names, [message.get("body", b"") for message in rest])


def exchange_messages(
    stub: StubServer,
    checker: StubChecker | None,
    path: str,
    messages: Sequence[dict[str, Any]],
    *,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    kept: KeptReadouts | None = None,
) -> list[Any]:
    """The middleware's messages to a client that sends these ASGI messages to the stub and then disconnects."""
    served = None if checker is None else Served(checker, partial(model_names, checker))
    state = SimpleNamespace(**{SERVED.name: served, KEPT.name: kept})
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": list(headers),
        "app": SimpleNamespace(state=state),
    }
    waiting, sent = list(messages), []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(SteerMiddleware(stub)(scope, receive, send))
    return sent
