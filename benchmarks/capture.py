"""Tokens per second of reading every token's row, against reading the mean of the same texts, in one engine.

    python -m benchmarks.capture [--small] [--tokens 100000] [--layers 8,12,16] [--out FILE] [--model FOLDER]

Each way reads all texts once: plain (no readout), mean, rows. The ways take turns call by call, so that a slow second
of the machine slows all; a round is one call of each, with 10,000 tokens. Time runs from building the requests to the
last readout collected. The texts are random token ids, a prompt each, of which one token is generated.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.engine_process import PLUGIN
from benchmarks.harness.line_process import ENGINE_ENVIRONMENT

os.environ |= ENGINE_ENVIRONMENT
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_PLUGINS", PLUGIN)  # no other plugin

import numpy as np

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.rounds import at_least, figures, in_turn, interval
from vllm_steer import Readout, collect_readouts, load_llm, steered

TEXT_TOKENS = 500
FIRST_WORD = 100  # lower ids are special in the tokenizers used here
CALL_TOKENS = 10_000
"""Tokens of one call, as in a batch of `vllm-steer capture`: its readouts are collected before the next call."""
GOAL = 0.9
"""Rows against the mean, 100,000 tokens at 3 layers."""


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="3 calls of each way: says little")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens that each way reads")
    parser.add_argument("--layers", default="8,12,16")
    parser.add_argument("--model", type=Path, default=None, help="a folder; default: the demo model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    num_calls = 3 if given.small else max(given.tokens // CALL_TOKENS, 1)
    layers = [int(layer) for layer in given.layers.split(",")]
    llm = load_llm(
        str(given.model or demo_model_path()),
        layers=layers,
        steer={"max_rows": TEXT_TOKENS * len(layers)},
        dtype=given.dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=TEXT_TOKENS + 1,
        kv_cache_memory_bytes=int(given.kv_cache_gib * 2**30),
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    ids = np.random.default_rng(0).integers(
        FIRST_WORD, vocabulary, (num_calls, CALL_TOKENS // TEXT_TOKENS, TEXT_TOKENS)
    )
    readouts = {"plain": None, "mean": Readout(layers), "rows": Readout(layers, pool="rows")}
    for readout in readouts.values():
        _rate(llm, readout, layers, ids[0])  # warm up
    ways: dict[str, Callable[[], float]] = {
        name: partial(next, map(partial(_rate, llm, readout, layers), ids)) for name, readout in readouts.items()
    }
    measured = figures(in_turn(ways, num_calls), "mean")
    for name, figure in measured.items():
        low, high = interval(figure.ratios)
        print(f"{name:6} {figure.median:8.0f} tokens/s, {figure.ratio:.3f} ({low:.3f} to {high:.3f}) of mean")
    low, high = interval(measured["rows"].ratios)
    verdict = at_least(GOAL, low, high)
    print(f"goal, rows at least {GOAL} of mean for 100,000 tokens at 3 layers: {verdict} with {ids.size} tokens")
    if given.out is not None:
        figures_of = {
            name: {**asdict(figure), "interval": interval(figure.ratios)} for name, figure in measured.items()
        }
        record.write(
            given.out, {"ways": figures_of}, tokens=int(ids.size), layers=layers, rounds=num_calls, dtype=given.dtype
        )


def _rate(llm: Any, readout: Readout | None, layers: list[int], ids: Any) -> float:
    """Tokens per second of one call. `ids` holds its prompts' token ids, (prompts, tokens of each)."""
    began = time.monotonic()
    prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
    outputs = llm.generate(prompts, steered({"max_tokens": 1, "temperature": 0.0}, [], readout), use_tqdm=False)
    seen = 0
    for (read,) in collect_readouts(llm, outputs) if readout is not None else ():
        assert read is not None
        # a mean counts the tokens in it, at each of its layers
        seen += sum(len(read.rows[layer]) if read.rows else read.num_tokens for layer in layers)
    seconds = time.monotonic() - began
    assert readout is None or seen == ids.size * len(layers)
    return float(ids.size / seconds)


if __name__ == "__main__":
    main()
