"""The offline API: what a script does with an ``LLM`` (see the example in the package's README)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer.directions import Direction
from vllm_steer.engine import vllm_versions
from vllm_steer.engine.front.admission import Asked, admission_of
from vllm_steer.engine.front.request_intake import EXTRA_ARGS
from vllm_steer.engine.registry import DirectionRegistry, bank_writes
from vllm_steer.engine.worker_answers import whole_readouts
from vllm_steer.errors import ChangeNotAllowed, MalformedSpec, ReadoutUnavailable
from vllm_steer.schema import WIRE_KEY, Readout, ReadoutResult, RequestSpec, Steering
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
    """
    config = {**engine_args.pop("additional_config", {}), **steer_config(layers, directions, **(steer or {}))}
    return LLM(model=model, additional_config=config, **engine_args)


def steered(
    params: SamplingParams | Mapping[str, Any],
    steering: Sequence[Steering] | None = None,
    readout: Readout | None = None,
) -> SamplingParams:
    """A copy of ``params`` that carries steering and a readout; the original stays as it is.

    The copy is shallow: a list in ``params``, such as ``stop``, is the copy's too.

    Args:
        params: sampling parameters, or a mapping of their fields.
        steering: any number of entries at any hooked layers; entries at one layer apply in this order. None leaves it
            to the engine's ``default_steering``, an empty list asks for none.
        readout: what to read, if anything.

    Raises:
        MalformedSpec: an argument of another type. What depends on the engine is checked when the request gets there.
        NotConfigured: vLLM would not load the plugin in this process, or loads it beside a release of vLLM in which it
            steers nothing.
    """
    if isinstance(params, Mapping):
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
    if spec != RequestSpec():
        EXTRA_ARGS.put(own, {**(own.extra_args or {}), WIRE_KEY: spec.dumps()})
    return own


def register_directions(llm: LLM, directions: Sequence[Direction]) -> None:
    """Register directions at run time, on all workers; all of them or none.

    A name and layer that exist already get the new content; requests in flight keep the old one.

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
    writes = registry.register(directions)
    if writes:
        llm.collective_rpc("vllm_steer_write", args=(bank_writes(writes),))


async def register_directions_async(engine: AsyncLLM, directions: Sequence[Direction]) -> None:
    """``register_directions`` for vLLM's ``AsyncLLM``; requests that are added meanwhile find the old content.

    Raises:
        What ``register_directions`` raises.
    """
    vllm_versions.require(is_engine_running=True)
    registry = _registry_of(engine.input_processor)
    if not engine.output_processor.has_unfinished_requests():
        registry.reclaim()
    # The workers first: a request that is admitted before they have the vectors must not find the new entries.
    writes = registry.reserve(directions)
    try:
        if writes:
            await engine.collective_rpc("vllm_steer_write", args=(bank_writes(writes),))
    except BaseException:
        registry.give_back(writes)
        raise
    registry.publish(writes)


def close_llm(llm: LLM) -> None:
    """Shut an engine down, so that another one can start in this process.

    Left to the garbage collector, an old in-process engine takes the process groups of vLLM with it whenever it happens
    to go, and with them those of an engine that has started meanwhile. Drop every reference to ``llm`` afterwards.
    """
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def abandon_requests(llm: LLM) -> int:
    """Abort whatever is unfinished in the engine; returns how many requests that were.

    After a step that raised, ``LLM.generate`` leaves its requests behind, and the next call would run them and return
    their outputs among its own. Safe to call at any time; does nothing when nothing is unfinished.

    Raises:
        MalformedSpec: ``llm`` is an ``AsyncLLM``.
    """
    _check_synchronous(llm, "abandon_requests")
    unfinished = list(llm.llm_engine.output_processor.request_states)
    if unfinished:
        llm.llm_engine.abort_request(unfinished, internal=True)
    return len(unfinished)


async def abandon_requests_async(engine: AsyncLLM) -> int:
    """``abandon_requests`` for vLLM's ``AsyncLLM``: whoever waits for one of them gets what it has so far."""
    unfinished = list(engine.output_processor.request_states)
    if unfinished:
        await engine.abort(unfinished, internal=True)
    return len(unfinished)


def collect_readouts(llm: LLM, outputs: Sequence[RequestOutput]) -> list[list[ReadoutResult | None]]:
    """Fetch the readouts of finished requests with one call to the workers.

    Args:
        llm: the engine that made ``outputs``.
        outputs: what ``llm.generate`` or ``llm.chat`` returned.

    Returns:
        ``reads[i][j]`` of sample j of prompt i; None where no readout was asked.

    Raises:
        NotConfigured: the engine runs without ``steer_config``.
        MalformedSpec: ``llm`` is an ``AsyncLLM``.
        ReadoutUnavailable: a readout or a trace that was asked cannot be given; its ``results`` holds all else, a
            readout whose trace alone failed among it.
    """
    vllm_versions.require(is_engine_running=True)
    _check_synchronous(llm, "collect_readouts")
    wanted = _Wanted.of(admission_of(llm.llm_engine.input_processor).asked, outputs)
    return wanted.results(llm.collective_rpc("vllm_steer_collect", args=(wanted.samples,)) if wanted.samples else [])


async def collect_readouts_async(
    engine: AsyncLLM, outputs: Sequence[RequestOutput]
) -> list[list[ReadoutResult | None]]:
    """``collect_readouts`` for vLLM's ``AsyncLLM``.

    Args:
        engine: the engine that made ``outputs``.
        outputs: the last output that ``engine.generate`` gave for each request. With ``RequestOutputKind.DELTA``, which
            shows each sample's last tokens only, readouts cannot be told apart from those of a shorter answer, so ask
            for ``CUMULATIVE`` or ``FINAL_ONLY``.

    Raises:
        What ``collect_readouts`` raises.
    """
    vllm_versions.require(is_engine_running=True)
    wanted = _Wanted.of(admission_of(engine.input_processor).asked, outputs)
    answers = await engine.collective_rpc("vllm_steer_collect", args=(wanted.samples,)) if wanted.samples else []
    return wanted.results(answers)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The samples whose readouts are to be fetched.

    Attributes:
        asked: what the requests asked, by the id that callers know.
        outputs: all finished requests, with a readout or without.
        places: (index of the output, index of the sample) of each sample with a readout.
        samples: what the workers are asked for each of them, see ``rpc.collect``.
        failed: the same places of samples with a readout that ended with an error -> the reason.
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
                    places.append((i, j))
                    end = prompt_len + len(sample.token_ids) - 1
                    samples.append((asked[output.request_id].key, sample.index, end))
        return cls(asked, outputs, places, samples, failed)

    def results(self, workers: Sequence[Any]) -> list[list[ReadoutResult | None]]:
        """The readouts, from the workers' answers; raises what ``collect_readouts`` raises."""
        results: list[list[ReadoutResult | None]] = [[None] * len(output.outputs) for output in self.outputs]
        answers = whole_readouts(workers) if self.samples else []
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
                results[i][j] = _result(answer, readout.trace)
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
        ChangeNotAllowed: it is a server's, which other processes share.
    """
    registry = admission_of(processor).registry
    if not isinstance(registry, DirectionRegistry):
        raise ChangeNotAllowed(
            "this engine is a server's, whose directions other processes share; allowed: PUT "
            "/v1/steering/directions/NAME. Use that."
        )
    return registry


def _check_synchronous(llm: Any, function: str) -> None:
    if isinstance(llm, AsyncLLM):
        raise MalformedSpec(
            f"{function} was called with an AsyncLLM; allowed: vllm.LLM. Await {function}_async(...) instead."
        )


def _result(answer: Mapping[str, Any], traced: Sequence[str]) -> ReadoutResult:
    mean = {}
    if answer["mean"] is not None:
        rows_LD = np.frombuffer(answer["mean"], dtype=np.float32).reshape(len(answer["layers"]), -1)
        mean = {layer: row_D.copy() for layer, row_D in zip(answer["layers"], rows_LD, strict=True)}
    projections: dict[str, dict[int, float]] = {}
    for name, layer, value in answer["projections"]:
        projections.setdefault(name, {})[layer] = value
    # In the order that was asked: pipeline stages answer in that of their layers.
    trace = {
        name: np.frombuffer(values, dtype=np.float32).copy()
        for name, values in sorted(answer["trace"], key=lambda one: traced.index(one[0]))
    }
    return ReadoutResult(mean=mean, num_tokens=answer["num_tokens"], projections=projections, trace=trace)
