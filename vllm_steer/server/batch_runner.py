"""Patches vLLM's offline batch runner (``run_batch``), whose lines then take the same fields as HTTP bodies."""

from __future__ import annotations

import functools
import json
from types import MethodType
from typing import Any

from pydantic import BaseModel
from vllm.entrypoints.launchers import run_batch
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse

from vllm_steer.engine.front.admission import Admission, admission_of
from vllm_steer.engine.front.http_exchange import Exchange, current_exchange
from vllm_steer.engine.front.request_intake import translated as with_status
from vllm_steer.engine.patching import patch
from vllm_steer.errors import NotOnThisRoute, SteerError
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.server.inbound.bodies import Translated, check_unsteered, translate
from vllm_steer.server.inbound.model_names import ModelNames
from vllm_steer.server.inbound.steered_routes import CHAT
from vllm_steer.server.outbound.readouts_in_replies import complete_reply


def install() -> None:
    """Install the patch of the batch runner."""
    RUN_REQUEST.install()


def _run_request(original: Any) -> Any:
    async def run_request(serving_engine_func: Any, request: Any, *args: Any) -> Any:
        return await original(functools.partial(_answer, serving_engine_func, request.url), request, *args)

    return run_request


async def _answer(serve: MethodType, url: str, body: BaseModel) -> Any:
    """Answer the body of a line with ``serve``, steered and read as the body asks.

    Raises:
        SteerError: the line is refused; vLLM writes the message as the line's error.
    """
    try:
        if not isinstance(body, ChatCompletionRequest):
            check_unsteered(url, body.model_extra or {})
            return await serve(body)
        serving = _serving_of(serve)
        admission = admission_of(serving.engine_client.input_processor)
        # vLLM keeps unknown fields in model_extra.
        fields = {
            **(body.model_extra or {}),
            "model": body.model,
            "n": body.n,
            "use_beam_search": body.use_beam_search,
            "vllm_xargs": body.vllm_xargs,
        }
        settings = admission.settings
        names = ModelNames(serving.models.model_name(), settings.served_aliases, settings.steering_in_model_names)
        asked = translate(CHAT, json.dumps(fields).encode(), None, admission, names)
        if asked.body is not None:
            rest = json.loads(asked.body)
            body = body.model_copy(update={name: rest[name] for name in ("model", "vllm_xargs")})
        exchange = _exchange_of(asked, admission)
        token = current_exchange.set(exchange)
        try:
            response = await serve(body)
        finally:
            current_exchange.reset(token)
        if exchange.refusal is not None:
            raise exchange.refusal
        return _completed(response, exchange)
    except SteerError as error:
        raise with_status(error) from None


def _serving_of(serve: MethodType) -> Any:
    """vLLM's ``OpenAIServingChat``; ``serve`` is one of its methods."""
    return serve.__self__


def _exchange_of(asked: Translated, admission: Admission) -> Exchange:
    whole = (asked.spec or RequestSpec()).with_default(admission.settings.default_steering)
    return Exchange(spec=asked.spec, whole=whole, choices_per_prompt=asked.choices_per_prompt)


def _completed(response: BaseModel, exchange: Exchange) -> BaseModel:
    """Add the readouts to a reply."""
    is_reply: bool = isinstance(response, ChatCompletionResponse)
    if not is_reply or exchange.whole.is_empty:
        return response  # an error, or the line asked for nothing
    if not exchange.is_applied:
        raise NotOnThisRoute("the line was answered without being steered or read; leave steering and readout out.")
    if exchange.whole.readout is None:
        return response
    reply = response.model_dump(mode="json")
    complete_reply(CHAT, reply, exchange)
    return type(response).model_validate(reply)


RUN_REQUEST = patch(
    run_batch,
    "run_request",
    _run_request,
    takes="async serving_engine_func, request, ...",
    why="The lines of a batch file pass no middleware, and vLLM ignores the fields of a body that it does not know.",
    gone_when="it refuses them.",
    when="the batch runner, with steer_config",
)
