"""A chat endpoint whose answers the test chooses, over real HTTP on the loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from unittest.mock import patch

from batch_jobs.endpoint.chat import Endpoint
from tests.support.server.loopback import serving


@dataclass(frozen=True)
class Answer:
    """What the endpoint sends: a status, headers, and a body that is JSON unless it is bytes."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def said(text: Any, finish_reason: str = "stop", **beside: Any) -> Answer:
    """A chat completion. `text`: the content, as a rule a text or None. `beside`: further fields of the message."""
    message = {"role": "assistant", "content": text, **beside}
    return Answer({"choices": [{"message": message, "finish_reason": finish_reason}]})


@dataclass
class FakeEndpoint:
    """A running endpoint and the requests it received."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)

    def endpoint(self, model: str = "fake", variable: str | None = None) -> Endpoint:
        """The endpoint as the client takes it; ``variable`` names the environment variable of its API key."""
        return Endpoint(f"{self.url}/v1", model, variable)


@contextmanager
def fake_endpoint(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[FakeEndpoint]:
    """Serve until the body ends; `answer` makes the reply to a request's JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append(request)
            fake.authorizations.append(self.headers["Authorization"])
            found = self.path == "/v1/chat/completions"
            reply = answer(request) if found else Answer({"error": "no such route"}, 404)
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with (
        patch.dict(os.environ, {"NO_PROXY": "127.0.0.1"}),  # a proxy of this machine cannot reach the endpoint
        serving(Handler) as url,
    ):
        fake = FakeEndpoint(url)
        yield fake
