"""The plugin's ASGI middleware: it translates request bodies and completes replies.

It runs inside vLLM's authentication, so a request without the right API key never reaches it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_steer.engine.front import metrics
from vllm_steer.engine.front.http_exchange import Exchange, current_exchange
from vllm_steer.engine.front.permissions import allowed_for
from vllm_steer.engine.patching import Attribute
from vllm_steer.errors import MalformedSpec, SteerError
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.server.inbound.api_key import api_key
from vllm_steer.server.inbound.bodies import Checker, Translated, not_on_this_route, translate
from vllm_steer.server.inbound.header import steering_header
from vllm_steer.server.inbound.model_names import ModelNames
from vllm_steer.server.inbound.steered_routes import NAMING, STEERED
from vllm_steer.server.openapi import DOCUMENT, describe
from vllm_steer.server.outbound.exposed_headers import ExposingSender
from vllm_steer.server.outbound.readouts_in_replies import list_aliases
from vllm_steer.server.outbound.refusals import error_body
from vllm_steer.server.outbound.reply_sender import AliasListingSender, ReplySender, WholeSender
from vllm_steer.server.readouts.kept_readouts import KeptReadouts
from vllm_steer.server.readouts.routes import KEPT

_MODELS = "/v1/models"
_FORMS = ("multipart/", "application/x-www-form-urlencoded", "application/octet-stream")


@dataclass(frozen=True, slots=True)
class Served:
    """The data that the middleware needs, kept in the application's state.

    Attributes:
        checker: the engine's admission.
        names: the model names, as they are now.
    """

    checker: Checker
    names: Callable[[], ModelNames]


SERVED: Attribute[Served] = Attribute(
    "the server's application state",
    "vllm_steer_served",
    why="What the middleware needs to know of the engine.",
    gone_when="an endpoint plugin can bring a middleware with a state of its own.",
)


class SteerMiddleware:
    """Reads POST bodies other than forms, completes steered replies and lists the aliases in ``/v1/models``.

    Requests that do not use the plugin keep their original bytes, and their replies stay as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request or websocket."""
        served: Served | None = None
        if scope["type"] in ("http", "websocket"):
            served = SERVED.of(scope["app"].state)
        if served is None:
            await self.app(scope, receive, send)
            return
        # A path with a trailing slash redirects to the route without it.
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        settings = served.checker.settings
        if scope["type"] == "websocket":  # realtime endpoints take requests over it
            exchange = Exchange(allowed=allowed_for(settings, api_key(scope)))
            await self._bound(exchange, scope, receive, send)
            return
        send = ExposingSender(send)
        if scope["method"] == "POST" and not _is_form(scope):
            await self._answer(served, path, scope, receive, send)
        elif scope["method"] == "POST":
            await self._pass_form(path, scope, receive, send)
        elif scope["method"] == "GET" and path == DOCUMENT:
            await self.app(scope, receive, WholeSender(send, describe))
        elif scope["method"] == "GET" and path == _MODELS and (aliases := served.names().aliases):
            await self.app(scope, receive, WholeSender(send, partial(list_aliases, aliases=aliases)))
        else:
            await self.app(scope, receive, send)

    async def _pass_form(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a form, which has no place for steering, unless its headers ask for some."""
        try:
            if steering_header(scope["headers"]) is not None:
                raise not_on_this_route("the header X-Steering", path)
        except SteerError as error:
            await _refuse(error, path, scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _answer(self, served: Served, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return  # the client has disconnected
        names, key = served.names(), api_key(scope)
        query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
        try:
            header = steering_header(scope["headers"])
            translated = translate(path, body, key, served.checker, names, query, header)
        except SteerError as error:
            await _refuse(error, path, scope, receive, send)
            return
        except RecursionError:  # Python can read nesting this deep, but not write it
            too_deep = MalformedSpec("the body is nested too deeply; allowed: a few hundred levels. Flatten it.")
            await _refuse(too_deep, path, scope, receive, send)
            return
        if translated.body is not None:
            body = translated.body
            headers = MutableHeaders(raw=list(scope["headers"]))
            if "content-length" in headers:
                headers["content-length"] = str(len(body))
            # Changed in place: vLLM's metrics read the route that routing stores in this same object.
            scope["headers"] = headers.raw
        receive = _replay(body, receive)
        if translated.model is not None and names.aliases and (path in STEERED or path in NAMING):
            send = AliasListingSender(send, names.aliases, translated.model)
        if path not in STEERED:
            await self.app(scope, receive, send)
            return
        exchange = _exchange_of(served, translated, key)
        if exchange.whole.is_empty:
            await self._bound(exchange, scope, receive, send)
            return
        reply = ReplySender(send, path, exchange, partial(_keep, KEPT.of(scope["app"].state), key))
        try:
            await self._bound(exchange, scope, receive, reply)
        except RuntimeError as error:  # raised by Starlette from the route's exception
            if not await reply.fail(error):
                raise

    async def _bound(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        token = current_exchange.set(exchange)
        try:
            await self.app(scope, receive, send)
        finally:
            current_exchange.reset(token)


def _exchange_of(served: Served, translated: Translated, key: str | None) -> Exchange:
    settings = served.checker.settings
    return Exchange(
        spec=translated.spec,
        whole=(translated.spec or RequestSpec()).with_default(settings.default_steering),
        choices_per_prompt=translated.choices_per_prompt,
        is_background=translated.is_background,
        alias=translated.alias,
        allowed=allowed_for(settings, key),
    )


async def _keep(kept: KeptReadouts | None, key: str | None, exchange: Exchange) -> None:
    """Keep the readouts of a reply whose id is known."""
    if kept is not None and kept.is_on and exchange.reply_id is not None and exchange.closed:
        await run_in_threadpool(kept.keep, exchange.reply_id, key, list(exchange.closed))


def _is_form(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").lower().startswith(_FORMS)


async def _refuse(error: SteerError, path: str, scope: Scope, receive: Receive, send: Send) -> None:
    metrics.refused(error)
    # In ASCII, because a quoted text may hold half a surrogate pair, which UTF-8 cannot encode.
    reply = Response(json.dumps(error_body(error, path)), error.status, media_type="application/json")
    await reply(scope, receive, send)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client disconnected before it was sent."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks) if len(chunks) > 1 else chunks[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns the body again, then the further messages."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
