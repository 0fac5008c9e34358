"""What steering and readout cost: one engine, the same prompts, four kinds of request in turn, ratios to unsteered.

    python benchmarks/bench_overhead.py [--rounds 5] [--requests 64] [--tokens 64] [--eager] [--out FILE]

Every round runs all kinds one after the other, so that a machine whose speed drifts slows all of them alike; the figure
to quote is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: nothing but the engine is timed
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

from batch_jobs.demo_model import demo_model_path
from vllm_steer import Direction, Readout, Steering, load_llm, register_directions, steered
from vllm_steer.engine.plugin import vllm_version

LAYERS = [8, 12, 16, 20, 24]
PLAIN = "unsteered"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    arguments = parser.parse_args()

    llm = load_llm(
        str(demo_model_path()), layers=LAYERS, dtype="bfloat16", enforce_eager=arguments.eager, max_model_len=512,
        kv_cache_memory_bytes=2 << 30, seed=0,
    )  # fmt: skip
    width = llm.llm_engine.model_config.get_hidden_size()
    noise = np.random.default_rng(0).standard_normal((len(LAYERS), width))
    register_directions(
        llm, [Direction("noise", layer, row).normalised() for layer, row in zip(LAYERS, noise, strict=True)]
    )
    prompts = [f"Letter number {index}: my neighbour asked me for help and" for index in range(arguments.requests)]
    kinds = {
        kind: params_of(kind, arguments)
        for kind in (PLAIN, "steered, distinct alpha", "5 layers steered", "5 layers read")
    }

    def throughput(kind: str) -> float:
        start = time.perf_counter()
        outputs = llm.generate(prompts, kinds[kind], use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start)

    for kind in kinds:
        throughput(kind)  # warm-up, compilation included
    rounds = [{kind: throughput(kind) for kind in kinds} for _ in range(arguments.rounds)]
    figures = {kind: summary(kind, rounds) for kind in kinds}
    for kind, figure in figures.items():
        spread = f"{figure['ratio_min']:.3f} to {figure['ratio_max']:.3f}"
        print(f"{kind:28} {figure['tokens_per_second']:8.1f} tok/s   ratio {figure['ratio']:.3f} ({spread})")
    if arguments.out:
        about = {"rounds": arguments.rounds, "requests": arguments.requests, "tokens": arguments.tokens}
        report = {
            "setup": {**about, "compiled": not arguments.eager, **machine()},
            "figures": figures,
            "rounds": rounds,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def params_of(kind: str, arguments: argparse.Namespace) -> list[Any]:
    """One SamplingParams a request; α goes from −20 to 20 and no two requests share one."""
    sampling = {"temperature": 0.7, "max_tokens": arguments.tokens, "ignore_eos": True}
    alphas = np.linspace(-20, 20, arguments.requests)
    if kind == "steered, distinct alpha":
        return [steered(sampling, [Steering("noise", float(alpha), layer=16)]) for alpha in alphas]
    if kind == "5 layers steered":
        return [steered(sampling, [Steering("noise", float(alpha), layer=one) for one in LAYERS]) for alpha in alphas]
    if kind == "5 layers read":
        return [steered(sampling, readout=Readout(LAYERS, span="all")) for _ in alphas]
    return [steered(sampling) for _ in alphas]


def summary(kind: str, rounds: list[dict[str, float]]) -> dict[str, float]:
    ratios = [round_[kind] / round_[PLAIN] for round_ in rounds]
    return {
        "tokens_per_second": statistics.median(round_[kind] for round_ in rounds),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "vllm-steer")
    return {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
        "vllm": vllm_version(), **{name: version(name) for name in names},
    }  # fmt: skip


if __name__ == "__main__":
    main()
