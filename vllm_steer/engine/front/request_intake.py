"""Handles every request in vLLM's front end: admission, marks for the workers, the key for the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from http import HTTPStatus
from typing import Any

from vllm import LLM, SamplingParams
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer.engine.front.admission import Admission, Asked, admission_of, configured_admission_of
from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.engine.resolved_spec import RESOLVED_KEY, sums_suffice
from vllm_steer.errors import MalformedSpec, SteerError, UnknownField
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.schema.wire import WIRE_KEY

SALT_PREFIX = "vllm_steer:"
_TRANSLATED: dict[str, type[SteerError]] = {}


def install() -> None:
    """Install the patches of the front end."""
    for one in (PROCESS_INPUTS, ASSIGN_REQUEST_ID, BEAM_SEARCH):
        one.install()


def _process_inputs(original: Any) -> Any:
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        try:
            asked = asked_of(self, said_by(params))
            if asked is not None and kwargs.get("resumable"):
                raise MalformedSpec(
                    "a streaming-input session asks for steering or a readout; allowed: whole prompts. Send one."
                )
            request = original(self, request_id, prompt, params, *args, **kwargs)
            _check_salt(request)
            if asked is None:
                _pass(configured_admission_of(self), request)
                return request
            if request.prompt_token_ids is None or request.prompt_embeds is not None:
                raise MalformedSpec(
                    "a prompt of embeddings asks for steering or a readout; allowed: text or token ids. Send these."
                )
            _admit(admission_of(self), asked, request)
            return request
        except SteerError as error:
            raise translated(error) from None

    return process_inputs


def _assign_request_id(original: Any) -> Any:
    def assign_request_id(self: InputProcessor, request: Any) -> None:
        params = request.sampling_params
        extra = params.extra_args if params is not None and params.extra_args else {}
        if RESOLVED_KEY in extra:
            admission_of(self)  # raises if this engine has no hooks: another one may have admitted the request
        elif WIRE_KEY in extra or (params is not None and _default_of(configured_admission_of(self))):
            raise MalformedSpec(
                "an EngineCoreRequest made by hand needs steering and has not passed admission; allowed: prompts with "
                "SamplingParams. Pass these."
            )
        original(request)

    return assign_request_id


def _beam_search(original: Any) -> Any:
    def beam_search(self: LLM, *args: Any, **kwargs: Any) -> Any:
        if _default_of(configured_admission_of(self.llm_engine.input_processor)):
            raise MalformedSpec(
                "beam_search was called on an engine with default_steering, and it computes generated tokens again as "
                "prompts; allowed: generate and chat. Use these, or an engine without default_steering."
            )
        return original(self, *args, **kwargs)

    return beam_search


def attach(params: SamplingParams, spec: RequestSpec) -> None:
    """Put a spec into sampling parameters: as JSON, and for a front end in this process as it is."""
    text = spec.dumps()
    EXTRA_ARGS.put(params, {**(params.extra_args or {}), WIRE_KEY: text})
    ATTACHED.put(params, (text, spec))


def said_by(params: SamplingParams) -> Mapping[str, Any]:
    """``extra_args``; a spec in it that ``attach`` put there need not be parsed."""
    extra, attached = params.extra_args or {}, ATTACHED.of(params)
    if attached is not None and extra.get(WIRE_KEY) is attached[0]:
        return {**extra, WIRE_KEY: attached[1]}
    return extra


def asked_of(processor: InputProcessor, extra: Mapping[str, Any]) -> Asked | None:
    """The steering and readout of a request, the engine's default included; None if there is neither.

    Args:
        processor: the engine's input processor.
        extra: the result of ``said_by``.

    Raises:
        NotConfigured: the request asks for something and the engine has no hooks.
        SpecError: the request's spec is malformed.
    """
    if RESOLVED_KEY in extra:
        raise UnknownField(
            f"extra_args has {RESOLVED_KEY!r}, which admission writes; allowed: {WIRE_KEY!r}. Remove it."
        )
    admission = configured_admission_of(processor)
    default = _default_of(admission)
    wire = extra.get(WIRE_KEY)
    if wire is None and not default:
        return None
    if wire is None:
        asked = Asked(RequestSpec())
    elif isinstance(wire, Asked):
        asked = wire
    else:
        asked = Asked(wire if isinstance(wire, RequestSpec) else RequestSpec.loads(wire))
    spec = asked.spec.with_default(default)
    if spec.is_empty:
        return None
    if admission is None:
        admission_of(processor)  # raises
    return asked if spec is asked.spec else replace(asked, spec=spec)


def _default_of(admission: Admission | None) -> tuple[Steering, ...]:
    return () if admission is None else admission.settings.default_steering


def translated(error: SteerError) -> SteerError:
    """The refusal as an exception that reaches HTTP clients with the refusal's own status.

    vLLM's asynchronous front end answers 500 to any exception but its own (vllm/v1/engine/async_llm.py, ``generate``).
    So the result has two bases: the refusal's class, which callers of the offline API catch, and vLLM's error that
    carries a status.
    """
    both = _with_status(type(error))
    refusal = both.__new__(both)
    GracefulHTTPError.__init__(refusal, str(error), HTTPStatus(error.status))
    assert isinstance(refusal, SteerError)
    error.give_place_to(refusal)
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


def _admit(admission: Admission, asked: Asked, request: Any) -> None:
    """Admit the request and write the result into it, for workers and scheduler. It is vLLM's copy of the caller's."""
    params = request.sampling_params
    prompt_len = len(request.prompt_token_ids)
    num_computed = None if params.max_tokens is None else prompt_len + params.max_tokens - 1
    resolved = admission.admit(request.request_id, asked.spec, prompt_len, asked.key, num_computed)
    dumped = resolved.dump()
    EXTRA_ARGS.put(params, {**_without_wire(params), RESOLVED_KEY: dumped})
    if resolved.windows[0].digest:
        CACHE_SALT.put(request, salt(request.cache_salt, resolved.windows[0].digest))
    readout = resolved.readout
    needs_first = readout is not None and readout.first < 1 and not sums_suffice(dumped["readout"])
    if resolved.looks_at_prompt or needs_first:  # see ``prefix_cache`` for the others
        SKIP_READING_PREFIX_CACHE.put(params, True)
    if readout is not None:
        admission.remember(request.request_id, asked)
    if asked.admitted is not None:
        asked.admitted()


def _pass(admission: Admission | None, request: Any) -> None:
    """Mark a request without steering and readout as checked if the engine has a default; remove its spec."""
    params = request.sampling_params
    if _default_of(admission):
        EXTRA_ARGS.put(params, {**_without_wire(params), RESOLVED_KEY: None})
    elif params.extra_args and WIRE_KEY in params.extra_args:
        EXTRA_ARGS.put(params, _without_wire(params))


def _without_wire(params: SamplingParams) -> dict[str, Any]:
    kept = dict(params.extra_args or {})
    kept.pop(WIRE_KEY, None)
    return kept


def salt(own: str | None, digest: str) -> str:
    """The cache salt of a request whose first token is steered; it depends on the request's own salt, ``own``, too."""
    return SALT_PREFIX + (sha256(f"{own}\0{digest}".encode()).hexdigest() if own else digest)


PROCESS_INPUTS = patch(
    InputProcessor,
    "process_inputs",
    _process_inputs,
    takes="self, request_id, prompt, params, ..., resumable=",
    contains="sampling_params = params.clone()",  # so we may write into the request's parameters
    why="Every front end calls it before a request is scheduled.",
    gone_when="there is an admission hook.",
)
ASSIGN_REQUEST_ID = patch(
    InputProcessor,
    "assign_request_id",
    _assign_request_id,
    takes="static request",
    contains="f'{request.external_req_id}-{random_uuid():.8}'",  # worker_steering.sample_key reads this form
    why="Ready-made EngineCoreRequest objects skip process_inputs but pass here; one with an unchecked spec would run "
    "unsteered.",
    gone_when="vLLM no longer takes ready-made requests, which is deprecated.",
)
BEAM_SEARCH = patch(
    LLM,
    "beam_search",
    _beam_search,
    takes="self, ...",
    why="It computes generated tokens again as prompt tokens, so an engine's default would steer them as such.",
    gone_when="beam search keeps a request's parameters and distinguishes prompt from generated tokens.",
)
_SPEC_GONE = "requests have typed fields for plugins."
EXTRA_ARGS: Attribute[dict[str, Any]] = Attribute(
    "SamplingParams",
    "extra_args",
    why="Carries a request's spec to the front end, and the resolved spec to scheduler and workers.",
    gone_when=_SPEC_GONE,
)
ATTACHED: Attribute[tuple[str, RequestSpec]] = Attribute(
    "SamplingParams",
    "vllm_steer_attached",
    why="The spec in extra_args with its JSON text, so that a front end in the same process need not parse it. Copies "
    "and other processes have the text alone.",
    gone_when=_SPEC_GONE,
)
SKIP_READING_PREFIX_CACHE: Attribute[bool] = Attribute(
    "SamplingParams",
    "skip_reading_prefix_cache",
    why="A trace from the first token on and a condition over the prompt need every activation computed, so cached KV "
    "cannot replace any token.",
    gone_when=_SPEC_GONE,
)
CACHE_SALT: Attribute[str] = Attribute(
    "EngineCoreRequest",
    "cache_salt",
    why="Keeps the blocks of differently steered prompts apart in the prefix cache.",
    gone_when=_SPEC_GONE,
)
