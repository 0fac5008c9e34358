"""Routes of the plugin: a refusal is answered with its status and OpenAI's error body."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from vllm_steer.engine.front import metrics
from vllm_steer.errors import DirectionNotFound, SteerError, UnknownDirection
from vllm_steer.server.outbound.refusals import error_body


class RefusingRoute(APIRoute):
    """Answers a ``SteerError`` with its status and OpenAI's error body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler of the route, with refusals answered."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except SteerError as error:
                metrics.refused(error)
                if type(error) is UnknownDirection and "{name" in self.path:  # here the URL names it, not a body
                    error = DirectionNotFound(str(error))
                return JSONResponse(error_body(error), error.status)

        return answer
