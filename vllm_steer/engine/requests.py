"""The way of every request through vLLM's front end: admitted, marked for the workers, keyed for the prefix cache."""

from __future__ import annotations

import functools
from hashlib import sha256
from http import HTTPStatus
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer.engine.admission import Admission, admission_of
from vllm_steer.engine.resolved import RESOLVED_KEY
from vllm_steer.errors import MalformedSpec, SteerError, UnknownField
from vllm_steer.schema import WIRE_KEY, RequestSpec

SALT_PREFIX = "vllm_steer:"
_TRANSLATED: dict[str, type[SteerError]] = {}


def install() -> None:
    """Wrap ``InputProcessor.process_inputs`` and ``assign_request_id`` (see ``vllm_steer.engine``)."""
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra = (params.extra_args or {}) if isinstance(params, SamplingParams) else {}
        try:
            if RESOLVED_KEY in extra:
                raise UnknownField(
                    f"extra_args has {RESOLVED_KEY!r}, which admission writes; allowed: {WIRE_KEY!r}. Remove it."
                )
            if WIRE_KEY not in extra:
                request = original(self, request_id, prompt, params, *args, **kwargs)
                _check_salt(request)
                return request
            admission = admission_of(self)
            spec = RequestSpec.loads(extra[WIRE_KEY])
            if kwargs.get("resumable"):
                raise MalformedSpec(
                    "a streaming-input session came with a steering spec; allowed: whole prompts. Send one."
                )
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if request.prompt_token_ids is None or request.prompt_embeds is not None:
                raise MalformedSpec(
                    "a prompt of embeddings came with a steering spec; allowed: text or token ids. Send these."
                )
            _check_salt(request)
            _admit(admission, spec, request)
            return request
        except SteerError as error:
            raise translated(error) from None

    assign = InputProcessor.assign_request_id

    @functools.wraps(assign)
    def assign_request_id(self: InputProcessor, request: Any) -> None:
        params = request.sampling_params
        extra = params.extra_args if params is not None and params.extra_args else {}
        if WIRE_KEY in extra:
            if RESOLVED_KEY not in extra:
                raise MalformedSpec(
                    "an EngineCoreRequest made by hand came with a steering spec, which nothing has checked; allowed: "
                    "prompts with SamplingParams. Pass these."
                )
            admission_of(self)  # another engine may have admitted it, and this one may have no hooks
        assign(request)

    InputProcessor.process_inputs = process_inputs
    InputProcessor.assign_request_id = assign_request_id


def translated(error: SteerError) -> SteerError:
    """The refusal that reaches an HTTP client with its own status.

    vLLM's asynchronous front end answers 500 to any exception but its own (vllm/v1/engine/async_llm.py, ``generate``),
    so a refusal becomes both: the class that callers of the offline API catch, and vLLM's error that carries a status.
    """
    both = _with_status(type(error))
    refusal = both.__new__(both)
    refusal.args, refusal.message, refusal.http_status = error.args, str(error), HTTPStatus(error.status)
    assert isinstance(refusal, SteerError)
    return refusal


def _with_status(refusal: type[SteerError]) -> Any:
    if refusal.__name__ not in _TRANSLATED:
        bases = (refusal, GracefulHTTPError)
        _TRANSLATED[refusal.__name__] = type(refusal.__name__, bases, {"__module__": refusal.__module__})
    return _TRANSLATED[refusal.__name__]


def _check_salt(request: Any) -> None:
    if request.cache_salt and request.cache_salt.startswith(SALT_PREFIX):
        raise MalformedSpec(
            f"cache_salt starts with {SALT_PREFIX!r}, which marks the blocks of steered requests; allowed: any "
            "other salt. Choose one."
        )


def _admit(admission: Admission, spec: RequestSpec, request: Any) -> None:
    resolved = admission.admit(request.request_id, spec, len(request.prompt_token_ids))
    params = request.sampling_params  # vLLM's own copy of the caller's
    params.extra_args = {**params.extra_args, RESOLVED_KEY: resolved.dump()}
    if resolved.prompt_digest:
        request.cache_salt = salt(request.cache_salt, resolved.prompt_digest)
    if spec.readout is not None:
        # Every activation has to be computed, so cached KV cannot stand in for any token, not even after a preemption.
        params.skip_reading_prefix_cache = True
        admission.remember(request.request_id, spec.readout)


def salt(own: str | None, prompt_digest: str) -> str:
    """The cache salt of a request whose prompt is steered, on top of the salt it may have of its own."""
    return SALT_PREFIX + sha256(f"{own or ''}\0{prompt_digest}".encode()).hexdigest()
