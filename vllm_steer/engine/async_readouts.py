"""The asynchronous front end of a server: what happens around one call of ``AsyncLLM.generate``.

It gives requests of paths whose bodies nobody reads their default steering and guard rails, holds the slots of running
requests, and collects each sample's readout the moment it is finished, for the exchange that the call belongs to.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, nullcontext
from typing import Any
from uuid import uuid4

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_steer.engine.admission import admission_of
from vllm_steer.engine.http import metrics
from vllm_steer.engine.http.bodies import check_allowed
from vllm_steer.engine.http.exchange import Exchange, Sample, current_exchange
from vllm_steer.engine.http.replies import finite, readout_json
from vllm_steer.engine.live_traces import LiveTraces
from vllm_steer.engine.requests import translated
from vllm_steer.engine.stages import whole_readouts
from vllm_steer.errors import SteerError
from vllm_steer.schema import WIRE_KEY, Readout, RequestSpec

_LIVE = "vllm_steer_live_traces"
_LOST = "it is no longer in the workers' store; raise steer_config(readout_store_mib=...)"

_installed = False


def install() -> None:
    """Wrap ``AsyncLLM.generate`` (see ``vllm_steer.engine``). Idempotent."""
    global _installed
    if _installed:
        return
    original = AsyncLLM.generate

    @functools.wraps(original)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[RequestOutput]:
        # Looked up here and not in the generator, which a task of vLLM's own may advance.
        exchange = current_exchange.get()
        params = _with_default(sampling_params, exchange)
        run = functools.partial(original, self, prompt, params, **kwargs)
        if not isinstance(params, SamplingParams) or WIRE_KEY not in (params.extra_args or {}):
            unsteered: AsyncIterator[RequestOutput] = run(request_id)
            return unsteered
        return _steered(self, run, params, request_id, exchange)

    AsyncLLM.generate = generate
    _installed = True


def _with_default(params: Any, exchange: Exchange | None) -> Any:
    """The parameters of a request, steered by default where it says nothing of steering."""
    if exchange is None or not exchange.default or not isinstance(params, SamplingParams):
        return params
    extra = params.extra_args or {}
    if WIRE_KEY in extra:
        return params
    copy = params.clone()
    copy.extra_args = {**extra, WIRE_KEY: RequestSpec(exchange.default).dumps()}
    return copy


async def _steered(
    engine: Any, run: Any, params: SamplingParams, request_id: str, exchange: Exchange | None
) -> AsyncIterator[RequestOutput]:
    """The outputs of a request that carries a spec; ``run`` starts it under the id that it is given."""
    try:
        try:
            spec = RequestSpec.loads(params.extra_args[WIRE_KEY])
            if exchange is not None:
                check_allowed(spec, exchange.allowed)
            admission = admission_of(engine.input_processor)
        except SteerError as error:
            raise translated(error) from None
        # Clients choose ids (X-Request-Id) and repeat them; the workers' store needs one that no other request has.
        engine_id = request_id if spec.readout is None else f"{request_id}-{uuid4().hex[:8]}"
        tally = Tally(is_delta=params.output_kind == RequestOutputKind.DELTA)
        collector = None
        if exchange is not None and spec.readout is not None:
            collector = Collector(engine, engine_id, request_id, spec.readout, exchange)
        try:
            with nullcontext() if admission.in_flight is None else admission.in_flight.hold(engine_id):
                async with aclosing(run(engine_id)) as outputs:
                    async for output in outputs:
                        if tally.prompt_len is None:
                            metrics.admitted(spec)
                        tally.add(output)
                        if collector is not None:
                            await collector.take(output, tally)
                        output.request_id = request_id
                        yield output
        finally:
            metrics.tokens(metrics.directions_of(spec), sum(tally.counts.values()))
            if collector is not None:
                collector.close()
            admission.asked.pop(engine_id, None)
    except SteerError as error:
        metrics.refused(error)
        if exchange is not None:
            exchange.refusal = error
        raise


class Tally:
    """How many tokens a request's samples have.

    Args:
        is_delta: each output tells only the new tokens of a sample, and not all of them so far.

    Attributes:
        prompt_len: tokens of the prompt; None before the first output.
        counts: sample index -> generated tokens.
    """

    def __init__(self, is_delta: bool) -> None:
        self.prompt_len: int | None = None
        self.counts: dict[int, int] = {}
        self._is_delta = is_delta

    def add(self, output: RequestOutput) -> None:
        if self.prompt_len is None:
            self.prompt_len = len(output.prompt_token_ids or ())
        for sample in output.outputs:
            before = self.counts.get(sample.index, 0) if self._is_delta else 0
            self.counts[sample.index] = before + len(sample.token_ids)

    def computed(self, index: int) -> int:
        """Tokens of a sample that have been through the model: the prompt and all generated ones but the last."""
        return (self.prompt_len or 0) + self.counts[index] - 1


class Collector:
    """Fetches the readouts of one engine request from the workers into the samples of its exchange.

    Args:
        engine: the ``AsyncLLM``.
        engine_id: the id that the workers know the request by.
        request_id: the one that vLLM's server knows.
        readout: what was asked.
        exchange: where the readouts go.
    """

    def __init__(self, engine: Any, engine_id: str, request_id: str, readout: Readout, exchange: Exchange) -> None:
        self._engine = engine
        self._engine_id = engine_id
        self._request_id = request_id
        self._readout = readout
        self._exchange = exchange
        self._live = live_traces_of(engine)
        self._followed: set[int] = set()
        self._finished: set[int] = set()

    async def take(self, output: RequestOutput, tally: Tally) -> None:
        """Note how far the samples of an output are; with one question, collect the readouts of the finished ones."""
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
                self._live.follow(self._engine_id, index, sample)
        if ended:
            asked = [(self._engine_id, index, tally.computed(index)) for index in ended]
            answers = whole_readouts(await self._engine.collective_rpc("vllm_steer_collect", args=(asked,)))
            for index, answer in zip(ended, answers, strict=True):
                self._live.leave(self._engine_id, index)
                finish(self._exchange.sample(self._request_id, index), answer or {"error": _LOST})

    def close(self) -> None:
        """Follow nothing any more, however the request ended."""
        for index in self._followed:
            self._live.leave(self._engine_id, index)

    def _span_length(self, tally: Tally, index: int) -> int:
        """How many tokens of the readout's span are known to belong to the sample."""
        prompt_len = tally.prompt_len or 0
        first = prompt_len if self._readout.span == "generated" else self._readout.skip_first
        end = tally.computed(index)
        return max(0, (min(end, prompt_len) if self._readout.span == "prompt" else end) - first)


def finish(sample: Sample, answer: Mapping[str, Any]) -> None:
    """Put a worker's last word on a sample in place."""
    sample.readout = readout_json(answer)
    for name, values in answer.get("trace", ()):
        sample.trace[name] = [finite(value) for value in np.frombuffer(values, dtype=np.float32).tolist()]
    sample.span_length = max((len(values) for values in sample.trace.values()), default=0)


def live_traces_of(engine: Any) -> LiveTraces:
    """The one poller of an engine's front end."""
    live: LiveTraces | None = getattr(engine, _LIVE, None)
    if live is None:
        live = LiveTraces(engine)
        setattr(engine, _LIVE, live)
    return live
