"""Around one call of the asynchronous front end: counting tokens, collecting readouts, following traces."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from vllm import CompletionOutput, RequestOutput

from vllm_steer.engine.front import live_traces
from vllm_steer.engine.front.async_generate import Collector, Tally
from vllm_steer.engine.front.http_exchange import Exchange
from vllm_steer.schema.conditions import Watch
from vllm_steer.schema.readout import Readout


class FakeEngine:
    """An engine whose workers know the readout and the trace of every sample; it records the calls."""

    def __init__(self, trace: list[float] | None = None) -> None:
        self.asked: list[tuple[str, list[Any]]] = []
        self.trace = trace or []
        self.failure: str | None = None

    engine_core = None

    async def collective_rpc(self, method: str, args: tuple[list[Any]]) -> list[Any]:
        (samples,) = args
        self.asked.append((method, samples))
        if method == "vllm_steer_traces":
            if self.failure is not None:
                return [[{"error": self.failure} for _ in samples]]
            return [[[("kind", self.trace[start:])] for _, _, start in samples]]
        values = np.array(self.trace, np.float32).tobytes()
        answer = {
            "num_tokens": len(self.trace),
            "layers": [2],
            "pooled": None,
            "max": [],
            "stopped": [],
            "flags": [],
            "projections": [],
            "trace": [["kind", values]],
            "rows": [],
            "trace_error": self.failure,
            "proof": "parity",
        }
        return [[None if index == 9 else answer for _, index, _ in samples]]


def _output(*samples: tuple[int, list[int], str | None], prompt_len: int = 5) -> RequestOutput:
    parts = [CompletionOutput(index, "", tokens, None, None, finish_reason=end) for index, tokens, end in samples]
    return RequestOutput("cmpl-x-0", None, list(range(prompt_len)), None, parts, finished=False)


@pytest.mark.parametrize("is_delta", [False, True])
def test_tokens_are_counted_whether_outputs_tell_the_new_ones_or_all(is_delta: bool) -> None:
    tally = Tally(is_delta)
    told = [[1], [2, 3], [4]] if is_delta else [[1], [1, 2, 3], [1, 2, 3, 4]]
    for tokens in told:
        tally.add(_output((0, tokens, None)))
    assert tally.counts == {0: 4}
    assert tally.computed(0) == 5 + 4 - 1  # the last token was never fed back


def test_the_last_token_of_a_stopped_sample_was_computed_too() -> None:
    tally = Tally(is_delta=True, readout=Readout(stop=Watch("kind", above=1.0)))
    tally.add(_output((0, [1, 2], None), (1, [1, 2], None)))
    ended = _output((0, [3], "stop"), (1, [3], "stop"))
    ended.outputs[0].stop_reason = "vllm_steer:kind"
    ended.outputs[1].stop_reason = "the end"  # a stop string
    tally.add(ended)
    assert (tally.computed(0), tally.computed(1)) == (5 + 3, 5 + 2)


def _collect(readout: Readout, engine: FakeEngine, outputs: list[RequestOutput]) -> Exchange:
    exchange = Exchange()

    async def run() -> None:
        collector = Collector(engine, "cmpl-x-0-unique", "cmpl-x-0", readout, exchange)
        tally = Tally(is_delta=True)
        for output in outputs:
            tally.add(output)
            await collector.take(output, tally)
        collector.close()

    asyncio.run(run())
    return exchange


def test_each_finished_sample_is_collected_once_with_the_end_that_was_computed() -> None:
    engine = FakeEngine()
    outputs = [
        _output((0, [1], None), (1, [1], None)),
        _output((1, [2], "stop")),
        _output((0, [2, 3], "length"), (1, [], "stop")),
    ]
    exchange = _collect(Readout([2]), engine, outputs)
    assert engine.asked == [
        ("vllm_steer_collect", [("cmpl-x-0-unique", 1, 6)]),
        ("vllm_steer_collect", [("cmpl-x-0-unique", 0, 7)]),
    ]
    assert set(exchange.samples) == {("cmpl-x-0", 0), ("cmpl-x-0", 1)}


def test_samples_that_finish_together_cost_one_question() -> None:
    engine = FakeEngine()
    _collect(Readout([2]), engine, [_output((0, [1, 2], "length"), (1, [1, 2], "length"))])
    assert len(engine.asked) == 1


def test_a_readout_that_is_gone_says_so_and_does_not_break_the_reply() -> None:
    exchange = _collect(Readout([2]), FakeEngine(), [_output((9, [1], "stop"))])
    readout = exchange.sample("cmpl-x-0", 9).readout
    assert readout is not None
    assert "no longer in the workers' store" in readout["error"]


@pytest.mark.parametrize(
    ("readout", "length"),
    [
        (Readout([2], "prompt", trace=["kind"]), 5),
        (Readout([2], "prompt", trace=["kind"], skip_first=2), 3),
        (Readout([2], "generated", trace=["kind"]), 2),
        (Readout([2], "all", trace=["kind"], skip_first=1), 6),
    ],
)
def test_only_values_of_tokens_that_were_fed_back_belong_to_a_running_sample(readout: Readout, length: int) -> None:
    exchange = _collect(readout, FakeEngine(), [_output((0, [1, 2, 3], None))])
    assert exchange.sample("cmpl-x-0", 0).span_length == length


def test_a_trace_is_followed_while_its_sample_runs_and_only_its_news_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_traces, "POLL_SECONDS", 0.001)
    engine, exchange = FakeEngine([1.0]), Exchange()

    async def run() -> list[list[float | None]]:
        live = live_traces.LiveTraces(engine)
        sample = exchange.sample("x", 0)
        live.follow("x-unique", 0, sample)
        seen = []
        for more in ([], [2.0, float("nan")]):
            engine.trace += more
            await asyncio.sleep(0.05)
            seen.append(list(sample.trace["kind"]))
        live.leave("x-unique", 0)
        await asyncio.sleep(0.05)
        asked = len(engine.asked)
        await asyncio.sleep(0.05)
        assert len(engine.asked) == asked  # nothing is followed, so no worker is called
        return seen

    assert asyncio.run(run()) == [[1.0], [1.0, 2.0, None]]
    assert {start for _, samples in engine.asked for _, _, start in samples} == {0, 1, 3}


def test_a_trace_that_failed_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_traces, "POLL_SECONDS", 0.001)
    engine = FakeEngine()
    engine.failure = "no column is free"

    async def run() -> None:
        live = live_traces.LiveTraces(engine)
        live.follow("x", 0, Exchange().sample("x", 0))
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert len(engine.asked) == 1
