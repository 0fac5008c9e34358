"""What the op takes of a decode step at which nothing is steered or read, with every layer configured.

    python -m benchmarks.overhead.idle_op [--rounds 8] [--out FILE]

One engine takes its steps in turn with the op and with a function in its place that does nothing. So the difference of
2 % between one engine process and the next, which ``overhead.bench`` has to average out, plays no part. The rest of
what an idle engine costs is on the host.

On a CPU only, where compiled code looks the op up at every call.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's steps are called here
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import SamplingParams

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.engine_process import COMPILED_WITH
from benchmarks.harness.fastest_dtype import fastest_dtype
from benchmarks.harness.rounds import figures, interval
from vllm_steer import close_llm, load_llm

WITH, WITHOUT = "with the op", "without"
PROMPT_TOKENS = 16


def main() -> None:
    """Time the steps, print the figures, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="batches of requests; one more before them warms up")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=48, help="decode steps of a round")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    arguments = parser.parse_args()
    model, dtype = demo_model_path(), fastest_dtype()
    num_layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    llm = load_llm(
        str(model), layers=list(range(num_layers)), dtype=dtype, seed=0, kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False, **COMPILED_WITH,
    )  # fmt: skip
    rounds = [
        pair
        for number in range(arguments.rounds + 1)
        for pair in steps_in_turn(llm.llm_engine, num_layers, arguments.requests, arguments.steps)
        if number
    ]
    close_llm(llm)
    found = figures(rounds, WITHOUT)
    for name, figure in found.items():
        low, high = interval(figure.ratios)
        print(f"{name:12} {1000 / figure.median:6.2f} ms a step   speed {figure.ratio:.4f} ({low:.4f} - {high:.4f})")
    if arguments.out is not None:
        about = {name: value for name, value in vars(arguments).items() if name != "out"}
        about |= {"model": model.name, "dtype": dtype, "layers": num_layers}
        record.write(arguments.out, {"figures": {name: asdict(one) for name, one in found.items()}}, **about)


def steps_in_turn(engine: Any, num_layers: int, requests: int, steps: int) -> list[dict[str, float]]:
    """Steps per second of decode steps that follow each other, in pairs: one with the op, one without."""
    sampling = SamplingParams(temperature=0, max_tokens=steps + 2, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(100, 100 + PROMPT_TOKENS))}
    for number in range(requests):
        engine.add_request(f"{time.monotonic_ns()}-{number}", prompt, sampling)
    engine.step()  # the prompts
    rates: list[dict[str, float]] = [{} for _ in range(steps // 2)]
    for place, pair in enumerate(rates):
        for name in (WITH, WITHOUT) if place % 2 else (WITHOUT, WITH):
            if name == WITH:
                pair[name] = _rate(engine)
            else:
                with _nothing_in_place_of_the_op(num_layers):
                    pair[name] = _rate(engine)
    while engine.has_unfinished_requests():
        engine.step()
    return rates


def _rate(engine: Any) -> float:
    start = time.perf_counter()
    engine.step()
    return 1 / (time.perf_counter() - start)


@contextmanager
def _nothing_in_place_of_the_op(num_layers: int) -> Iterator[None]:
    """Let compiled code call a function that does nothing.

    Raises:
        SystemExit: it was not called once a layer, so nothing was compared.
    """
    packet: Any = torch.ops.vllm_steer.steer_and_read
    op, calls = packet.default, 0

    def nothing(*_: object) -> None:
        nonlocal calls
        calls += 1

    packet.default = nothing
    try:
        yield
    finally:
        packet.default = op
    if calls != num_layers:
        raise SystemExit(f"a step called the op {calls} times, not once at each of {num_layers} layers.")


if __name__ == "__main__":
    main()
