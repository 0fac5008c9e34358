"""The offline API: functions for scripts that use an ``LLM`` or an ``AsyncLLM``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer.directions import Direction
from vllm_steer.engine import vllm_versions
from vllm_steer.engine.front.admission import Asked, admission_of
from vllm_steer.engine.front.all_engines import call_workers
from vllm_steer.engine.front.request_intake import attach
from vllm_steer.engine.log import logger
from vllm_steer.engine.registry import MANY, DirectionRegistry, bank_writes, registration_memory
from vllm_steer.engine.worker_answers import ModelRecord, whole_model, whole_readouts
from vllm_steer.errors import ChangeNotAllowed, MalformedSpec, ReadoutUnavailable
from vllm_steer.schema.conditions import Crossing
from vllm_steer.schema.readout import Readout, ReadoutResult
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.settings import steer_config


def load_llm(
    model: str,
    *,
    layers: Sequence[int],
    directions: Any = (),
    steer: Mapping[str, Any] | None = None,
    **engine_args: Any,
) -> LLM:
    """``vllm.LLM`` with steering switched on, for code that does not import vLLM itself.

    Args:
        model: hub id or local path.
        layers: decoder blocks to hook, 0-based.
        directions: direction file or files to load at start-up.
        steer: other settings of ``steer_config``, such as ``max_alpha``.
        **engine_args: passed to ``vllm.LLM``.

    Raises:
        SettingsError: a setting of ``steer_config`` is wrong.
    """
    config = {**engine_args.pop("additional_config", {}), **steer_config(layers, directions, **(steer or {}))}
    return LLM(model=model, additional_config=config, **engine_args)


def steered(
    params: SamplingParams | Mapping[str, Any],
    steering: Sequence[Steering] | None = None,
    readout: Readout | None = None,
) -> SamplingParams:
    """Copy sampling parameters and add steering and a readout to the copy.

    The copy is shallow: it shares lists such as ``stop`` with ``params``.

    Args:
        params: sampling parameters, or a mapping of their fields.
        steering: entries at any hooked layers, as many as ``max_entries`` and ``max_windows`` allow; entries at one
            layer apply in this order. None leaves the engine's ``default_steering`` on; an empty list turns it off.
        readout: the activations to read, or None.

    Raises:
        MalformedSpec: an argument has another type. The engine checks the rest when it gets the request.
        NotConfigured: vLLM does not load the plugin in this process.
        UnsupportedFeature: the installed vLLM is not supported, or ``VLLM_STEER_DISABLE`` switches the plugin off.
    """
    if not isinstance(params, SamplingParams) and isinstance(params, Mapping):
        params = SamplingParams(**params)
    if not isinstance(params, SamplingParams):
        raise MalformedSpec(
            f"params is {type(params).__name__}; allowed: SamplingParams or a mapping of its fields. Steering needs "
            "sampling."
        )
    if steering is not None and (
        isinstance(steering, Steering) or not all(isinstance(entry, Steering) for entry in steering)
    ):
        raise MalformedSpec(f"steering is {steering!r}; allowed: a list of Steering(...).")
    if readout is not None and not isinstance(readout, Readout):
        raise MalformedSpec(f"readout is {readout!r}; allowed: a Readout(...) or None.")
    spec = RequestSpec(None if steering is None else tuple(steering), readout)
    own = copy(params)  # vLLM clones it in full for every request
    if not spec.is_empty:
        vllm_versions.require(is_engine_running=False)
    if steering is not None or readout is not None:
        attach(own, spec)
    return own


def register_directions(llm: LLM, directions: Sequence[Direction]) -> None:
    """Register directions on all workers while the engine runs; either all of them or none.

    A direction replaces one of the same name and layer. Requests in flight keep the old vector. Ten thousand of 4,096
    numbers take about a second; the log says before what memory so many take.

    Raises:
        NotConfigured: the engine runs without ``steer_config``.
        MalformedSpec: ``llm`` is an ``AsyncLLM``.
        WrongDimension, BankFull: see ``DirectionRegistry.register``.
    """
    vllm_versions.require(is_engine_running=True)
    _check_synchronous(llm, "register_directions")
    registry = _registry_of(llm.llm_engine.input_processor)
    if not llm.llm_engine.has_unfinished_requests():
        registry.reclaim()
    writes = registry.reserve(directions)
    _say_memory(registry, writes)
    try:
        for message in bank_writes(writes):
            llm.collective_rpc("vllm_steer_write", args=message)
    except BaseException:
        registry.give_back(writes)
        raise
    registry.publish(writes)


async def register_directions_async(engine: AsyncLLM, directions: Sequence[Direction]) -> None:
    """``register_directions`` for vLLM's ``AsyncLLM``. Requests added during the call get the old vectors.

    Raises:
        SteerError: as ``register_directions``.
    """
    vllm_versions.require(is_engine_running=True)
    registry = _registry_of(engine.input_processor)
    if not engine.output_processor.has_unfinished_requests():
        registry.reclaim()
    # Workers first: a request that is admitted before they have the vectors must not find the new entries.
    writes = registry.reserve(directions)
    _say_memory(registry, writes)
    try:
        for message in bank_writes(writes):
            await call_workers(engine, "vllm_steer_write", *message)
    except BaseException:
        registry.give_back(writes)
        raise
    registry.publish(writes)


def close_llm(llm: LLM) -> None:
    """Shut an engine down, so that another one can start in this process.

    Without this call, the garbage collector destroys vLLM's process groups at an unknown time, even while another
    in-process engine uses them. Drop every reference to ``llm`` afterwards.
    """
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def abandon_requests(llm: LLM) -> int:
    """Abort all unfinished requests and return their number.

    After a step that raised, ``LLM.generate`` leaves its requests in the engine; the next call would run them and
    return their outputs among its own. The function can be called at any time.

    Raises:
        MalformedSpec: ``llm`` is an ``AsyncLLM``.
    """
    _check_synchronous(llm, "abandon_requests")
    unfinished = list(llm.llm_engine.output_processor.request_states)
    if unfinished:
        llm.llm_engine.abort_request(unfinished, internal=True)
    return len(unfinished)


async def abandon_requests_async(engine: AsyncLLM) -> int:
    """``abandon_requests`` for vLLM's ``AsyncLLM``. Waiting callers get the tokens generated so far."""
    unfinished = list(engine.output_processor.request_states)
    if unfinished:
        await engine.abort(unfinished, internal=True)
    return len(unfinished)


def collect_readouts(llm: LLM, outputs: Sequence[RequestOutput]) -> list[list[ReadoutResult | None]]:
    """Fetch the readouts of finished requests with one call to the workers.

    Args:
        llm: the engine that made ``outputs``.
        outputs: the result of ``llm.generate`` or ``llm.chat``.

    Returns:
        ``reads[i][j]``: the readout of sample j of prompt i; None if none was requested.

    Raises:
        NotConfigured: the engine runs without ``steer_config``.
        MalformedSpec: ``llm`` is an ``AsyncLLM``.
        ReadoutUnavailable: a requested readout or trace is missing. ``results`` of the error holds all others, and
            also readouts of which only the trace failed.
    """
    vllm_versions.require(is_engine_running=True)
    _check_synchronous(llm, "collect_readouts")
    wanted = _Wanted.of(admission_of(llm.llm_engine.input_processor).asked, outputs)
    return wanted.results([llm.collective_rpc("vllm_steer_collect", args=(wanted.samples,))] if wanted.samples else [])


async def collect_readouts_async(
    engine: AsyncLLM, outputs: Sequence[RequestOutput]
) -> list[list[ReadoutResult | None]]:
    """``collect_readouts`` for vLLM's ``AsyncLLM``.

    Args:
        engine: the engine that made ``outputs``.
        outputs: the last output of ``engine.generate`` for each request. Use ``RequestOutputKind.CUMULATIVE`` or
            ``FINAL_ONLY``: with ``DELTA`` the last output has only the last tokens, so the sample's length is unknown.

    Raises:
        SteerError: as ``collect_readouts``, except for the check of ``llm``.
    """
    vllm_versions.require(is_engine_running=True)
    wanted = _Wanted.of(admission_of(engine.input_processor).asked, outputs)
    return wanted.results(await call_workers(engine, "vllm_steer_collect", wanted.samples) if wanted.samples else [])


def model_record(llm: LLM) -> ModelRecord:
    """What is known about how an engine's model returns the residual stream.

    Returns:
        ``architecture``; ``proof``, as ``ReadoutResult.proof``; ``experiment``, the record of the experiment at
        start-up: what it measured in each layer, the bounds, and the seconds it took. All plain types.

    Raises:
        NotConfigured: the engine runs without ``steer_config``.
        MalformedSpec: ``llm`` is an ``AsyncLLM``.
    """
    vllm_versions.require(is_engine_running=True)
    _check_synchronous(llm, "model_record")
    admission_of(llm.llm_engine.input_processor)  # raises NotConfigured
    return whole_model([llm.collective_rpc("vllm_steer_model")])


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The samples whose readouts to fetch.

    Attributes:
        asked: request id of the caller -> the request's steering and readout.
        outputs: all finished requests, with or without a readout.
        places: (index of the output, index of the sample) of each sample with a readout.
        samples: the argument of ``rpc.collect`` for each of ``places``.
        failed: place of a sample that ended with an error -> the reason.
    """

    asked: Mapping[str, Asked]
    outputs: Sequence[RequestOutput]
    places: Sequence[tuple[int, int]]
    samples: list[tuple[str, int, int]]
    failed: dict[tuple[int, int], str]

    @classmethod
    def of(cls, asked: Mapping[str, Asked], outputs: Sequence[RequestOutput]) -> _Wanted:
        places, samples = [], []
        failed: dict[tuple[int, int], str] = {}
        for i, output in enumerate(outputs):
            if output.request_id in asked:
                prompt_len = len(output.prompt_token_ids or ())
                for j, sample in enumerate(output.outputs):
                    if sample.finish_reason == "error":
                        failed[i, j] = str(sample.stop_reason or "the engine ended the request with an error")
                        continue
                    readout = asked[output.request_id].spec.readout
                    is_stopped = readout is not None and readout.is_stopped_by(sample.stop_reason)
                    places.append((i, j))
                    end = prompt_len + len(sample.token_ids) - (not is_stopped)
                    samples.append((asked[output.request_id].key, sample.index, end))
        return cls(asked, outputs, places, samples, failed)

    def results(self, engines: Sequence[Any]) -> list[list[ReadoutResult | None]]:
        """Build the result of ``collect_readouts`` from the answers of each engine's workers.

        Raises:
            ReadoutUnavailable: as ``collect_readouts``.
        """
        results: list[list[ReadoutResult | None]] = [[None] * len(output.outputs) for output in self.outputs]
        answers = whole_readouts(engines) if self.samples else []
        reasons = dict(self.failed)
        for (i, j), answer in zip(self.places, answers, strict=True):
            if answer is None:
                reasons[i, j] = (
                    "it is no longer in the store; collect sooner or raise steer_config(readout_store_mib=...)"
                )
            elif "error" in answer:
                reasons[i, j] = answer["error"]
            else:
                readout = self.asked[self.outputs[i].request_id].spec.readout
                assert readout is not None  # or it would not be in ``asked``
                results[i][j] = _result(answer, readout)
                if answer["trace_error"] is not None:
                    reasons[i, j] = f"its trace failed, {answer['trace_error']}"
        if reasons:
            (i, j), reason = next(iter(reasons.items()))
            raise ReadoutUnavailable(
                f"{len(reasons)} of {len(self.samples) + len(self.failed)} readouts cannot be given; the first, sample "
                f"{j} of prompt {i}: {reason}. The others are in this error's results.",
                results,
                reasons,
            )
        return results


def _registry_of(processor: InputProcessor) -> DirectionRegistry:
    """The registry of an engine that scripts may change.

    Raises:
        NotConfigured: the engine runs without ``steer_config``.
        ChangeNotAllowed: the engine belongs to a server, whose processes share the registry.
    """
    registry = admission_of(processor).registry
    if not isinstance(registry, DirectionRegistry):
        raise ChangeNotAllowed(
            "this engine is a server's, whose directions other processes share; allowed: PUT "
            "/v1/steering/directions/NAME. Use that."
        )
    return registry


def _say_memory(registry: DirectionRegistry, writes: Sequence[Any]) -> None:
    if len(writes) >= MANY:
        logger.info("%s.", registration_memory(len(writes), registry.hidden_size, registry.capacity))


def _check_synchronous(llm: Any, function: str) -> None:
    if isinstance(llm, AsyncLLM):
        raise MalformedSpec(
            f"{function} was called with an AsyncLLM; allowed: vllm.LLM. Await {function}_async(...) instead."
        )


def _result(answer: Mapping[str, Any], asked: Readout) -> ReadoutResult:
    pooled = {}
    if answer["pooled"] is not None:
        rows_LD = np.frombuffer(answer["pooled"], dtype=np.float32).reshape(len(answer["layers"]), -1)
        pooled = {layer: row_D.copy() for layer, row_D in zip(answer["layers"], rows_LD, strict=True)}
    projections: dict[str, dict[int, float]] = {}
    for name, layer, value in answer["projections"]:
        projections.setdefault(name, {})[layer] = value
    # In the requested order; pipeline stages answer in the order of their layers.
    trace = {
        name: np.frombuffer(values, dtype=np.float32).copy()
        for name, values in sorted(answer["trace"], key=lambda one: asked.trace.index(one[0]))
    }
    largest: dict[str, dict[int, tuple[float, int]]] = {}
    for name, layer, value, position in answer["max"]:
        largest.setdefault(name, {})[layer] = value, position
    rows = {
        layer: np.frombuffer(stored, dtype=np.float32).reshape(-1, size).copy()
        for layer, size, stored in answer["rows"]
    }
    return ReadoutResult(
        mean=pooled if asked.pool == "mean" else {},
        num_tokens=answer["num_tokens"],
        projections=projections,
        trace=trace,
        proof=answer["proof"],
        last=pooled if asked.pool == "last" else {},
        max=largest,
        held=tuple(answer.get("held") or ()),
        stopped=next(iter(starmap(Crossing, answer["stopped"])), None),
        flags=tuple(starmap(Crossing, answer["flags"])),
        rows=rows,
    )
