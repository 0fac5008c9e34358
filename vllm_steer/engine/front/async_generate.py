"""The asynchronous front end: the work around one call of ``AsyncLLM.generate``.

In a server it adds the steering and readout of the HTTP exchange to the request, holds the slots of running requests,
and collects each sample's readout as soon as the sample is finished.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer import spans
from vllm_steer.engine import early_ends
from vllm_steer.engine.front import metrics
from vllm_steer.engine.front.admission import Admission, Asked, admission_of, configured_admission_of
from vllm_steer.engine.front.all_engines import call_workers
from vllm_steer.engine.front.http_exchange import Exchange, Sample, current_exchange
from vllm_steer.engine.front.live_traces import LiveTraces
from vllm_steer.engine.front.permissions import check_allowed
from vllm_steer.engine.front.readout_json import finite, readout_json
from vllm_steer.engine.front.request_intake import EXTRA_ARGS, asked_of, said_by, translated
from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.engine.worker_answers import whole_readouts
from vllm_steer.errors import MalformedSpec, SteerError
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY

_LOST = "it is no longer in the workers' store; raise steer_config(readout_store_mib=...)"
_RAY_STAGE = "ray.llm._internal.batch.stages.vllm_engine_stage"


def install() -> None:
    """Install the patches of the asynchronous front end."""
    GENERATE.install()
    SHUTDOWN.install()


def _generate(original: Any) -> Any:
    def generate(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[RequestOutput]:
        # Read here and not in the generator, which another task of vLLM may advance.
        exchange = current_exchange.get()
        run = functools.partial(original, self, prompt, request_id=request_id, **kwargs)
        if _says_nothing(self, sampling_params, exchange):
            plain: AsyncIterator[RequestOutput] = run(sampling_params)
            return plain
        return _generated(self, run, sampling_params, request_id, exchange)

    return generate


def _shutdown(original: Any) -> Any:
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        handler = getattr(self, "output_handler", None)
        if handler is not None and not handler.get_loop().is_closed():
            # The handler was cancelled before it could pass the error to the requests that wait for outputs.
            tell = functools.partial(self.output_processor.propagate_error, EngineDeadError())
            handler.get_loop().call_soon_threadsafe(tell)

    return shutdown


def _says_nothing(engine: Any, params: Any, exchange: Exchange | None) -> bool:
    """Whether the request, its exchange and the engine's default all ask for neither steering nor a readout."""
    if not isinstance(params, SamplingParams):
        return True
    if (exchange is not None and exchange.spec is not None) or WIRE_KEY in (params.extra_args or {}):
        return False
    admission = configured_admission_of(engine.input_processor)
    return admission is None or not admission.settings.default_steering


async def _generated(
    engine: Any, run: Any, params: SamplingParams, request_id: str, exchange: Exchange | None
) -> AsyncIterator[RequestOutput]:
    """The outputs of a request, which ``run`` starts with the sampling parameters that it gets."""
    try:
        params, asked = _with_asked(engine, params, exchange)
        outputs: AsyncIterator[RequestOutput] = run(params)
        if asked is not None:
            outputs = _steered(engine, outputs, asked, params, request_id, exchange)
        async with aclosing(outputs):  # type: ignore[type-var]  # they are generators
            async for output in outputs:
                yield output
    except SteerError as error:
        metrics.refused(error)
        if exchange is not None:
            exchange.refusal = error
        raise


def _with_asked(engine: Any, params: SamplingParams, exchange: Exchange | None) -> tuple[SamplingParams, Asked | None]:
    """The sampling parameters with the request's spec in them, and this spec, or None without one.

    Raises:
        SteerError: the request is refused.
    """
    extra = said_by(params)
    try:
        if WIRE_KEY in extra:
            asked = asked_of(engine.input_processor, extra)
            if asked is not None and exchange is not None:
                check_allowed(asked.spec, exchange.allowed)
        elif exchange is not None and exchange.spec is not None:
            asked = asked_of(engine.input_processor, {WIRE_KEY: Asked(exchange.spec)})
        else:
            asked = asked_of(engine.input_processor, extra)
        if asked is not None and asked.spec.readout is not None and exchange is None and _RAY_STAGE in sys.modules:
            raise MalformedSpec(
                "a readout was requested in Ray Data's LLM stage, which does not return readouts; allowed: steering "
                "there. For readouts use map_batches with your own engine and collect_readouts."
            )
    except SteerError as error:
        raise translated(error) from None
    if asked is None and (exchange is None or exchange.spec is None):
        return params, None
    own = params.clone()
    if asked is None:  # an explicit empty spec, so that the default does not apply
        EXTRA_ARGS.put(own, {**extra, WIRE_KEY: Asked(RequestSpec(()))})
        return own, None
    if exchange is not None:
        asked = replace(asked, admitted=exchange.mark_applied)
    EXTRA_ARGS.put(own, {**extra, WIRE_KEY: asked})
    return own, asked


async def _steered(
    engine: Any,
    outputs: AsyncIterator[RequestOutput],
    asked: Asked,
    params: SamplingParams,
    request_id: str,
    exchange: Exchange | None,
) -> AsyncIterator[RequestOutput]:
    spec, admission = asked.spec, admission_of(engine.input_processor)
    tally = Tally(params.output_kind == RequestOutputKind.DELTA, spec.readout)
    collector = None
    if exchange is not None and spec.readout is not None:
        collector = Collector(engine, asked.key, request_id, spec.readout, exchange)
    is_uncollected = exchange is None and spec.readout is not None
    try:
        with (
            nullcontext() if admission.in_flight is None else admission.in_flight.hold(request_id),
            _alone(engine, request_id) if is_uncollected else nullcontext(),
        ):
            async with aclosing(outputs):  # type: ignore[type-var]
                async for output in outputs:
                    if tally.prompt_len is None:
                        metrics.admitted(spec)
                    _check_ends(output)
                    tally.add(output)
                    if collector is not None:
                        await collector.take(output, tally)
                    yield output
    finally:
        metrics.tokens(metrics.directions_of(spec), sum(tally.counts.values()))
        if collector is not None:
            collector.close()
            _forget(admission, request_id, asked)


def _check_ends(output: RequestOutput) -> None:
    for sample in output.outputs:
        if sample.finish_reason == "error" and (refusal := early_ends.refusal(sample.stop_reason)) is not None:
            raise translated(refusal)


def _forget(admission: Admission, request_id: str, asked: Asked) -> None:
    """Keep a request out of ``collect_readouts``, because its own reply carried its readouts."""
    if admission.asked.get(request_id) is not None and admission.asked[request_id].key == asked.key:
        del admission.asked[request_id]


@contextmanager
def _alone(engine: Any, request_id: str) -> Iterator[None]:
    """Reserve the id of a running request, by which ``collect_readouts_async`` will find its readouts.

    Raises:
        MalformedSpec: another running request has the same id.
    """
    running = RUNNING.of(engine)
    if running is None:
        running = set()
        RUNNING.put(engine, running)
    if request_id in running:
        raise translated(
            MalformedSpec(
                f"request id {request_id!r} belongs to another running request with a readout, so their readouts could "
                "not be told apart; allowed: an id that no running request has. Choose another."
            )
        )
    running.add(request_id)
    try:
        yield
    finally:
        running.remove(request_id)


class Tally:
    """Counts the tokens of a request's samples.

    Args:
        is_delta: whether an output holds only the new tokens of a sample, and not all of them so far.
        readout: the request's readout, whose ``stop`` has the last token computed; None for none.

    Attributes:
        prompt_len: number of prompt tokens; None before the first output.
        counts: sample index -> number of generated tokens.
    """

    def __init__(self, is_delta: bool, readout: Readout | None = None) -> None:
        self.prompt_len: int | None = None
        self.counts: dict[int, int] = {}
        self._is_delta = is_delta
        self._readout = readout
        self._stopped: set[int] = set()

    def add(self, output: RequestOutput) -> None:
        """Count the tokens of one output."""
        if self.prompt_len is None:
            self.prompt_len = len(output.prompt_token_ids or ())
        for sample in output.outputs:
            before = self.counts.get(sample.index, 0) if self._is_delta else 0
            self.counts[sample.index] = before + len(sample.token_ids)
            if self._readout is not None and self._readout.is_stopped_by(sample.stop_reason):
                self._stopped.add(sample.index)

    def computed(self, index: int) -> int:
        """Number of a sample's tokens that the model has processed.

        These are the prompt and all generated ones but the last, and the last too where ``Readout.stop`` held for it.
        """
        return (self.prompt_len or 0) + self.counts[index] - (index not in self._stopped)


class Collector:
    """Fetches the readouts of one engine request from the workers into the samples of its exchange.

    Args:
        engine: the ``AsyncLLM``.
        key: the name under which the workers keep the request's readouts.
        request_id: the request's id in vLLM's server.
        readout: the requested readout.
        exchange: receives the readouts.
    """

    def __init__(self, engine: Any, key: str, request_id: str, readout: Readout, exchange: Exchange) -> None:
        self._engine = engine
        self._key = key
        self._request_id = request_id
        self._readout = readout
        self._exchange = exchange
        self._live = live_traces_of(engine)
        self._followed: set[int] = set()
        self._finished: set[int] = set()

    async def take(self, output: RequestOutput, tally: Tally) -> None:
        """Note the progress of an output's samples, and collect the readouts of finished ones in one RPC."""
        ended = []
        for part in output.outputs:
            index = part.index
            if index in self._finished:
                continue
            sample = self._exchange.sample(self._request_id, index)
            sample.span_length = self._span_length(tally, index)
            if part.finish_reason is not None:
                self._finished.add(index)
                ended.append(index)
            elif self._readout.trace and index not in self._followed:
                self._followed.add(index)
                self._live.follow(self._key, index, sample)
        if ended:
            asked = [(self._key, index, tally.computed(index)) for index in ended]
            answers = whole_readouts(await call_workers(self._engine, "vllm_steer_collect", asked))
            for index, answer in zip(ended, answers, strict=True):
                self._live.leave(self._key, index)
                finish(self._exchange.sample(self._request_id, index), answer or {"error": _LOST}, self._readout.pool)
                metrics.crossings(answer or {})

    def close(self) -> None:
        """Stop following the samples' traces, however the request ended."""
        for index in self._followed:
            self._live.leave(self._key, index)

    def _span_length(self, tally: Tally, index: int) -> int:
        """Number of tokens in the readout's span that are known to belong to the sample."""
        prompt_len = tally.prompt_len or 0
        first, end = spans.read_run(self._readout.span, self._readout.skip_first, prompt_len)
        computed = tally.computed(index)
        return max(0, (computed if end is None else min(computed, end)) - first)


def finish(sample: Sample, answer: Mapping[str, Any], pool: str) -> None:
    """Store the final answer for a sample, in the form of ``FinishedReadout.answer``, whose readout has this pool."""
    sample.readout = readout_json(answer, pool)
    for name, values in answer.get("trace", ()):
        sample.trace[name] = [finite(value) for value in np.frombuffer(values, dtype=np.float32).tolist()]
    sample.span_length = max((len(values) for values in sample.trace.values()), default=0)


def live_traces_of(engine: Any) -> LiveTraces:
    """The poller of an engine's front end, created at the first call."""
    live = LIVE_TRACES.of(engine)
    if live is None:
        live = LiveTraces(engine)
        LIVE_TRACES.put(engine, live)
    return live


_GONE = "outputs can carry data from the workers."
GENERATE = patch(
    AsyncLLM,
    "generate",
    _generate,
    takes="async self, prompt, sampling_params, request_id, *, ...",
    contains="except (VLLMClientError, GracefulHTTPError",  # a refusal passes through unchanged
    why="vLLM's server calls it for every engine request, and its outputs pass through no other place; a readout must "
    "be collected between a sample's last token and the reply.",
    gone_when=_GONE,
    when="front ends of an AsyncLLM with steer_config",
)
SHUTDOWN = patch(
    AsyncLLM,
    "shutdown",
    _shutdown,
    takes="self, ...",
    contains="cancel_task_threadsafe(handler)",  # then no request learns that the engine has died
    why="It cancels the task that distributes outputs before that task has failed the waiting requests. They, and the "
    "server's own shutdown, would wait for ever.",
    gone_when="it fails the waiting requests.",
    when="front ends of an AsyncLLM with steer_config",
)
RUNNING: Attribute[set[str]] = Attribute(
    "AsyncLLM", "vllm_steer_running", why="Request ids whose readouts are yet to be collected.", gone_when=_GONE
)
LIVE_TRACES: Attribute[LiveTraces] = Attribute(
    "AsyncLLM", "vllm_steer_live_traces", why="The poller of the traces of running requests.", gone_when=_GONE
)
