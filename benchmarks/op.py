"""The custom op alone, in turn with a plain copy of the bytes that it must move: how near it comes to memory bandwidth.

    python -m benchmarks.op [--small] [--out FILE]

It must move, for steering, each steered row of hidden once in each direction and its entries' directions once per step;
for a readout, the rows of hidden and residual that are read, and the sums and last rows of their accumulators. On the
CPU small sizes are bound by calls, not by memory. CUDA times are of replayed graphs, as in the engine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import record
from benchmarks.harness.rounds import figures, in_turn
from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.ops import cpu, reference
from vllm_steer.ops.dispatch import steer_and_read
from vllm_steer.ops.layer_tables import tables_at
from vllm_steer.plan.batch_plan import BatchPlanner, Pooling, RequestPlan
from vllm_steer.plan.entry_rows import Entry

COPY = "copy"
COMPILED = {"cpu": "C++", "cuda": "triton"}
"""Device -> name of what the registered op runs there."""
SLOTS, MOST_RUNS, SECONDS_A_ROUND = 64, 20, 0.05


@dataclass(frozen=True)
class Setting:
    """One step of the engine.

    Attributes:
        requests: number of requests.
        tokens: tokens of each request.
        dimension: hidden size.
        steered: share of the requests that are steered.
        entries: steering entries of each steered request.
        is_read: whether all requests are read, and none is steered.
    """

    requests: int
    tokens: int
    dimension: int
    steered: float = 0.0
    entries: int = 1
    is_read: bool = False

    @property
    def name(self) -> str:
        """The step in words, for tables."""
        what = "read" if self.is_read else f"{self.steered:.0%} steered, {self.entries} entries"
        return f"{self.requests} × {self.tokens} tokens, D {self.dimension}, {what}"

    def num_bytes(self, element_size: int) -> int:
        """Bytes that any implementation must move; `element_size`: bytes of an element of hidden."""
        tokens = self.requests * self.tokens
        if self.is_read:
            # hidden and residual; the sums in both directions, and the last rows
            return 2 * tokens * self.dimension * element_size + 3 * self.requests * self.dimension * 4
        steered = self.num_steered
        directions = min(steered * self.entries, SLOTS)
        return 2 * steered * self.tokens * self.dimension * element_size + directions * self.dimension * 4

    @property
    def num_steered(self) -> int:
        """Number of steered requests."""
        return round(self.requests * self.steered)


def settings(is_small: bool) -> list[Setting]:
    """All steps to measure, steered ones first."""
    sizes = (576, 3584) if is_small else (576, 3584, 8192)
    shapes = ((64, 1),) if is_small else ((1, 1), (64, 1), (4, 512), (16, 512))
    found = [
        Setting(requests, tokens, dimension, steered, entries)
        for dimension, (requests, tokens), steered, entries in itertools.product(sizes, shapes, (0, 0.1, 1), (1, 8))
        if (steered or entries == 1) and (steered != 0.1 or requests >= 10)
    ]
    reads = itertools.product(sizes, ((64, 1), (64, 16), (4, 512)))
    return found + [Setting(requests, tokens, dimension, is_read=True) for dimension, (requests, tokens) in reads]


def buffers_of(setting: Setting, device: torch.device) -> SteerBuffers:
    """Buffers of one layer on `device` whose tables are filled for the step."""
    rng = np.random.default_rng(0)
    requests = max(setting.requests, 64)
    buffers = SteerBuffers(
        num_layers=1, hidden_size=setting.dimension, max_tokens=setting.requests * setting.tokens,
        max_requests=requests, max_entries=8, max_directions=SLOTS, trace_columns=8, device=device,
    )  # fmt: skip
    for slot in range(SLOTS):
        row = rng.standard_normal(setting.dimension)
        buffers.write_directions([slot], (row / np.linalg.norm(row)).astype(np.float32)[None])
    planner = BatchPlanner(1, requests, 8, 8)
    ids = [str(number) for number in range(setting.requests)]
    for number, request_id in enumerate(ids):
        slots = rng.integers(SLOTS, size=setting.entries)
        # A small α, so that the rows stay finite over thousands of runs.
        steered = number < setting.num_steered
        entries = tuple(Entry(0, int(slot), 1e-6, 0.0) for slot in slots) if steered else ()
        pooling = Pooling((0,), 0, None) if setting.is_read else None
        if entries or pooling:
            planner.add(request_id, RequestPlan(((0, entries), (setting.tokens, ())) if entries else (), pooling))
    plan = planner.build(ids, [0] * len(ids), [setting.tokens] * len(ids))
    if plan is not None:
        buffers.write(plan)
    return buffers


def seconds_of(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that measures the mean seconds of a call to `work`; on CUDA within a replayed graph."""
    if device.type == "cuda":
        work()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(MOST_RUNS):
                work()

        def replayed() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3 / MOST_RUNS

        return replayed

    def called(num_runs: int) -> float:
        start = time.perf_counter()
        for _ in range(num_runs):
            work()
        return (time.perf_counter() - start) / num_runs

    called(1)  # warms up
    num_runs = min(max(int(SECONDS_A_ROUND / called(1)), 1), MOST_RUNS)
    return lambda: called(num_runs)


def measure(setting: Setting, device: torch.device, dtype: torch.dtype, num_rounds: int) -> dict[str, Any]:
    """Measure a step with the copy and every implementation in turn; the step's part of the record."""
    buffers = buffers_of(setting, device)
    tokens = setting.requests * setting.tokens
    hidden, residual = (torch.randn(tokens, setting.dimension, device=device).to(dtype) for _ in range(2))
    tables = tables_at(buffers.flags_L4[0])
    num_bytes = setting.num_bytes(hidden.element_size())
    source = torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)  # a copy reads and writes
    target = torch.empty_like(source)
    works: dict[str, Callable[[], object]] = {
        COPY: lambda: target.copy_(source),
        "reference": lambda: reference.steer_and_read(hidden, residual, *tables),
    }
    if device.type == "cpu":
        works["python"] = lambda: cpu.steer_and_read(hidden, residual, *tables)
    works[COMPILED[device.type]] = partial(steer_and_read, hidden, residual, buffers.flags_L4[0])
    ways = {name: seconds_of(work, device) for name, work in works.items()}
    with torch.inference_mode():
        rounds = in_turn(ways, num_rounds)
    found = {
        name: {"seconds": one.median, "gb_per_second": num_bytes / one.median / 1e9, "times_copy": one.ratio,
               "times_copy_low": one.ratio_low, "times_copy_high": one.ratio_high}
        for name, one in figures(rounds, COPY).items()
    }  # fmt: skip
    return {"setting": asdict(setting), "name": setting.name, "bytes": num_bytes, "figures": found, "rounds": rounds}


def main() -> None:
    """Measure all steps, print their figures, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a decode step and readouts, in under 90 s on 2 cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = []
    for setting in settings(arguments.small):
        one = measure(setting, device, getattr(torch, arguments.dtype), arguments.rounds)
        measured.append(one)
        print(f"{one['name']:52} {one['bytes'] / 1e6:9.3f} MB", end="")
        for name, figure in one["figures"].items():
            print(f"  {name} {figure['seconds'] * 1e6:9.1f} µs {figure['gb_per_second']:7.2f} GB/s", end="")
        print(flush=True)
    if arguments.out:
        record.write(arguments.out, {"steps": measured}, rounds=arguments.rounds, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
