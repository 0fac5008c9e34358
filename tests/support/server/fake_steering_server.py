"""A fake server: speaks the routes that the playground uses and streams made-up tokens, over real HTTP on the loopback.

Its replies are computed from α alone, so a test knows what the page must show: token i of a reply to α reads
α + i mod 3, and no value comes before the next token's text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from tests.support.server.loopback import serving
from vllm_steer.server.playground.page import PATHS, playground_page

LAYERS = (1, 2)
DIRECTIONS = ({"name": "kind", "layer": 2}, {"name": "wry", "layer": 1})
MAX_ALPHA = 1000.0
NORM = 40.0


@dataclass
class FakeSteeringServer:
    """A running fake: its behaviour, and the requests it received."""

    url: str
    api_key: str | None = None
    tokens: int = 12
    seconds_per_token: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    abandoned: int = 0
    """Streams that the client left before their end."""

    def words(self, alpha: float) -> list[str]:
        """The texts of a reply's chunks; the fourth token has no text, as half a character has none."""
        words = [
            f" {'warm' if alpha > 0 else 'plain' if alpha == 0 else 'cold'}{index}" for index in range(self.tokens)
        ]
        return [*words[:3], "", " é\u2028", *words[5:]]

    def values(self, alpha: float) -> list[float]:
        """The trace: one value for each token but the last, which is never fed back."""
        return [alpha + index % 3 for index in range(self.tokens - 1)]


@contextmanager
def fake_steering_server() -> Iterator[FakeSteeringServer]:
    """Serve until the body ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == PATHS[1] or (path == PATHS[0] and fake.api_key is None):
                page, policy = playground_page()
                self._answer(200, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})
            elif not self._has_key():
                self._json(401, {"error": "Unauthorized"})
            elif path == "/v1/steering":
                shown = {"layers": LAYERS, "max_alpha": MAX_ALPHA, "residual_norms": {str(x): NORM for x in LAYERS}}
                self._json(200, {**shown, "directions": DIRECTIONS})
            elif path == "/v1/models":
                listed = [{"id": "fake-kind", "parent": "fake"}, {"id": "fake", "parent": None}]
                self._json(200, {"data": listed})
            else:
                self._json(404, {"error": {"message": f"no route {path}"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._has_key():
                self._json(401, {"error": "Unauthorized"})
                return
            fake.requests.append({"path": self.path, **body})
            (entry,) = body["steering"]
            alpha = next(entry[name] for name in ("alpha", "low", "high") if name in entry)
            if abs(alpha) > MAX_ALPHA / 2:
                told = {"message": f"alpha is {alpha}; use a smaller one", "type": "BadAlpha", "code": 400}
                self._json(400, {"error": told})
                return
            self._stream(alpha, entry["direction"], chat=self.path.endswith("/chat/completions"))

        def _stream(self, alpha: float, direction: str, *, chat: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            words, values = fake.words(alpha), fake.values(alpha)
            if chat:
                self._event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            try:
                for index, word in enumerate(words):
                    time.sleep(fake.seconds_per_token)
                    text: dict[str, Any] = {"delta": {"content": word}} if chat else {"text": word}
                    choice = {"index": 0, **text, "token_ids": [index], "finish_reason": None}
                    if index:
                        choice["trace"] = {direction: {"start": index - 1, "values": [values[index - 1]]}}
                    if index == len(words) - 1:
                        mean = sum(values) / len(values)
                        choice["finish_reason"] = "length"
                        choice["readout"] = {"num_tokens": len(values), "projections": {direction: {"2": mean}}}
                    self._event(choice)
                self.wfile.write(b"data: [DONE]\n\n")
            except (BrokenPipeError, ConnectionResetError):
                fake.abandoned += 1
            self.close_connection = True

        def _event(self, choice: dict[str, Any]) -> None:
            # like vLLM, without escapes for other alphabets and U+2028
            self.wfile.write(f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode())
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
        yield fake
