"""The playground: one page for steering in the browser, with no build step and nothing loaded from elsewhere.

Two paths serve the page. On a server without an API key, open ``/v1/steering/playground``. With a key, vLLM guards all
of ``/v1``, and a browser cannot send the key when it opens a page, so open ``/steering/playground`` instead. The page
holds only this package's own text. It fetches its data from ``/v1`` with the keys that its user types in. It keeps
them in memory and puts them into no URL.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

PATHS = ("/v1/steering/playground", "/steering/playground")
_STYLE = "page.css"
# In the order in which they run; each may use the names of those before it.
_SCRIPTS = (
    "safetensors.js",
    "http.js",
    "stream.js",
    "strengths.js",
    "bodies.js",
    "code.js",
    "link.js",
    "strength_field.js",
    "choices.js",
    "entries.js",
    "diff.js",
    "line_styles.js",
    "sample.js",
    "shading.js",
    "column.js",
    "chart.js",
    "records.js",
    "picture.js",
    "upload_refusals.js",
    "registering.js",
    "settings.js",
    "running.js",
    "staleness.js",
    "conversation.js",
    "adding.js",
    "page.js",
)


def playground_router(is_on: Callable[[Request], bool]) -> APIRouter:
    """The routes of the page; ``is_on`` says whether the settings of the request's server enable ``playground``."""
    router = APIRouter()

    async def show_playground(request: Request) -> Response:
        if not is_on(request):
            message = (
                "the playground is disabled; start the server with vllm-steer serve --playground, or with playground: "
                "true in its vllm_steer settings."
            )
            error = {"message": message, "type": "NotFoundError", "param": None, "code": HTTPStatus.NOT_FOUND}
            return JSONResponse({"error": error}, status_code=HTTPStatus.NOT_FOUND)
        page, policy = playground_page()
        return HTMLResponse(
            page,
            headers={
                "Content-Security-Policy": policy,
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-cache",
            },
        )

    for path in PATHS:
        router.add_api_route(path, show_playground, methods=["GET"], include_in_schema=False)
    return router


@cache
def playground_page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that allows its own scripts and styles only.

    The page may connect to the server it came from, and to no other.
    """
    style, scripts = _read(_STYLE), [_read(name) for name in _SCRIPTS]
    parts = {"style": style, "scripts": "\n".join(f"<script>{script}</script>" for script in scripts)}
    page = re.sub(r"\{\{(style|scripts)\}\}", lambda found: parts[found[1]], _read("page.html"))
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_source, scripts))}; style-src {_source(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
