"""A fake server: speaks the routes that the playground uses and streams made-up tokens, over real HTTP on the loopback.

Its replies are computed from the steering alone, so a test knows what the page must show: token i of sample s of a
reply to α reads α + s + i mod 3, and no value comes before the next token's text.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
from safetensors.numpy import save

from tests.support.server.loopback import serving
from vllm_steer.server.playground.page import PATHS, playground_page

LAYERS = (1, 2)
MAX_ALPHA = 1000.0
NORM = 40.0
ALIAS, ALIAS_ALPHA = "fake-kind", 30.0
KIND = np.arange(1, 9, dtype="<f4") / np.float32(np.sqrt(204))
PREFIX = "/v1/steering/directions/"


def direction(name: str, layer: int, norm: float = 1.0) -> dict[str, Any]:
    """One entry of the list of directions."""
    return {"name": name, "layer": layer, "content_hash": f"hash-of-{name}", "is_unit": norm == 1, "norm": norm}


@dataclass
class FakeSteeringServer:
    """A running fake: its behaviour, and the requests it received."""

    url: str
    api_key: str | None = None
    admin_key: str | None = None
    max_alpha: float | None = MAX_ALPHA
    max_norms: float | None = None
    norms: bool = True
    directions: list[dict[str, Any]] = field(
        default_factory=lambda: [direction("kind", 2), direction("long", 2, 4.0), direction("wry", 1)]
    )
    tokens: int = 12
    seconds_per_token: float = 0.0
    death: str = ""
    """What it does behind the third token: ``ends`` the reply, ``closes`` or ``resets`` the connection, ``freezes``."""
    thaw: threading.Event = field(default_factory=threading.Event)
    """Ends the freeze."""
    frozen: bool = False
    requests: list[dict[str, Any]] = field(default_factory=list)
    changes: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """(method, name, query, body) of each change of a direction."""
    abandoned: int = 0
    """Streams that the client left before their end."""

    def words(self, alpha: float) -> list[str]:
        """The texts of a reply's chunks; the fourth token has no text, as half a character has none."""
        words = [
            f" {'warm' if alpha > 0 else 'plain' if alpha == 0 else 'cold'}{index}" for index in range(self.tokens)
        ]
        return [*words[:3], "", " é\u2028", *words[5:]][: self.tokens]

    def values(self, alpha: float, sample: int = 0) -> list[float]:
        """The trace: one value for each token but the last, which is never fed back."""
        return [alpha + sample + index % 3 for index in range(self.tokens - 1)]


@contextmanager
def fake_steering_server() -> Iterator[FakeSteeringServer]:
    """Serve until the body ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._freeze()
            path = urlsplit(self.path).path
            if path == PATHS[1] or (path == PATHS[0] and fake.api_key is None):
                page, policy = playground_page()
                self._answer(200, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})
            elif path == "/version":
                self._json(200, {"version": "0.0-fake"})
            elif not self._has_key():
                self._json(401, {"error": "Unauthorized"})
            elif path == "/v1/steering":
                self._json(200, self._shown())
            elif path == "/v1/models":
                listed = [{"id": ALIAS, "parent": "fake"}, {"id": "fake", "parent": None}]
                self._json(200, {"data": listed})
            elif path.startswith(PREFIX):
                self._answer(200, save({"kind@2": KIND}), "application/octet-stream", {})
            else:
                self._json(404, {"error": {"message": f"no route {path}"}})

        def _shown(self) -> dict[str, Any]:
            return {
                "version": "0.0.1-fake",
                "layers": LAYERS,
                "max_alpha": fake.max_alpha,
                "max_alpha_residual_norm": fake.max_norms,
                "residual_norms": {str(layer): NORM for layer in LAYERS} if fake.norms else {},
                "aliases": {ALIAS: [{"direction": "kind", "alpha": ALIAS_ALPHA}]},
                "directions": fake.directions,
                "changes": fake.admin_key is not None,
            }

        def do_PUT(self) -> None:
            self._change("PUT")

        def do_DELETE(self) -> None:
            self._change("DELETE")

        def _change(self, method: str) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            name, query = unquote(url.path.removeprefix(PREFIX)), dict(parse_qsl(url.query))
            if self.headers["X-Admin-Key"] != fake.admin_key:
                self._json(403, {"error": {"message": "X-Admin-Key is not this server's admin key"}})
                return
            if query.get("format") == "npy" and "layer_index" not in query:
                self._json(
                    400, {"error": {"message": "the upload does not say how it counts layers. Give layer_index"}}
                )
                return
            fake.changes.append((method, name, query, body))
            fake.directions = [one for one in fake.directions if one["name"] != name]
            listed = [direction(name, int(query.get("layer", 2)))]
            fake.directions += listed if method == "PUT" else []
            self._json(200, {"directions": listed})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._has_key():
                self._json(401, {"error": "Unauthorized"})
                return
            fake.requests.append({"path": self.path, **body})
            alpha = alpha_of(body)
            if abs(alpha) > MAX_ALPHA / 2:
                told = {"message": f"alpha is {alpha}; use a smaller one", "type": "BadAlpha", "code": 400}
                self._json(400, {"error": told})
                return
            self._stream(alpha, body, chat=self.path.endswith("/chat/completions"))

        def _stream(self, alpha: float, body: dict[str, Any], *, chat: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")  # as vLLM's server does
            self.end_headers()
            words, samples = fake.words(alpha), range(body.get("n", 1))
            try:
                for index in samples if chat else ():
                    self._event({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
                for token, word in enumerate(words):
                    time.sleep(fake.seconds_per_token)
                    if token == 3 and fake.death:
                        self._die()
                        return
                    for index in samples:
                        text: dict[str, Any] = {"delta": {"content": word}} if chat else {"text": word}
                        choice = {"index": index, **text, "token_ids": [token], "finish_reason": None}
                        self._event(choice | self._read(token, fake.values(alpha, index), body))
                self._write(b"data: [DONE]\n\n")
                self._write(b"")
            except (BrokenPipeError, ConnectionResetError):
                fake.abandoned += 1
                self.close_connection = True

        def _read(self, token: int, values: list[float], body: dict[str, Any]) -> dict[str, Any]:
            (name,) = body["readout"]["trace"]
            told: dict[str, Any] = {}
            if token:
                told["trace"] = {name: {"start": token - 1, "values": [values[token - 1]]}}
            if token == len(values):
                told["finish_reason"] = "length"
                told["readout"] = {"num_tokens": token, "projections": {name: {"2": sum(values) / token}}}
            return told

        def _die(self) -> None:
            self.close_connection = True
            if fake.death == "ends":
                self._write(b"")
                return
            if fake.death == "freezes":
                fake.frozen = True
                self._freeze()
            elif fake.death == "resets":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.rfile.close()  # the socket is only closed with it
            self.connection.close()

        def _freeze(self) -> None:
            if fake.frozen:
                fake.thaw.wait()

        def _event(self, choice: dict[str, Any]) -> None:
            # like vLLM, without escapes for other alphabets and U+2028
            self._write(f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode())

        def _write(self, chunk: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()

        def _has_key(self) -> bool:
            return fake.api_key is None or self.headers["Authorization"] == f"Bearer {fake.api_key}"

        def _json(self, status: int, body: Any) -> None:
            self._answer(status, json.dumps(body).encode(), "application/json", {})

        def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as url:
        fake = FakeSteeringServer(url)
        try:
            yield fake
        finally:
            fake.thaw.set()


def alpha_of(body: dict[str, Any]) -> float:
    """The number of a request's first entry; 0 without steering, that of the alias for its model name."""
    if body["model"] == ALIAS:
        return ALIAS_ALPHA
    first = next(iter(body["steering"]), {"alpha": 0})
    return float(next(first[name] for name in ("alpha", "low", "high") if name in first))
