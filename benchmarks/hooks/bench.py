"""The paper's grid and extraction, with Hugging Face hooks in three ways and with vLLM.

    python -m benchmarks.hooks.bench [--small] [--out FILE] [--model FOLDER --device cuda]

- paper: one prompt at a time, a hook, no KV cache; one text at a time, all hidden states kept.
- cached: one prompt at a time, a hook, with the KV cache.
- batched: hooks with the cache, rows of different α in one batch; texts in padded batches, hooks at the layers read.
- ours: all rows, or all texts, in one call of a compiled engine in this process.

The hooks' dtype and batch sizes are the fastest of several, tried first on the same work. Batches are tried only in the
dtype in which the paper's way is fastest, since the same arithmetic bounds both. Ways that go one at a time are timed
on a stated sample of the rows and texts. Rates are tokens generated per second and texts read per second.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.engine_process import COMPILED_WITH, PLUGIN
from benchmarks.harness.fastest_dtype import fastest_dtype
from benchmarks.harness.line_process import ENGINE_ENVIRONMENT

# The engine runs in this process, as the hooks do: they share threads and cores, and only one works at a time.
os.environ |= ENGINE_ENVIRONMENT
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_PLUGINS", PLUGIN)  # no other plugin

import numpy as np
import torch

from batch_jobs.demo_model import demo_model_path
from benchmarks.gpu import vllm_024
from benchmarks.harness import record
from benchmarks.harness.rounds import figures, in_turn
from benchmarks.hooks.hf_hooks import HookedModel, Means
from benchmarks.hooks.paper_work import PaperWork, Row, has_tokenizer, paper_work
from vllm_steer import Direction, Readout, Steering, collect_readouts, load_llm, register_directions, steered

LAYERS = (8, 12, 16, 20, 24)
STEERED_LAYER = 16
WORSE = 2.0
"""Ours may differ from float32 by at most this many times the difference of hooks in bfloat16: both round equally
often, in different places. A wrong layer or token, or an α that is not applied, differs at least ten times as much."""


@dataclass(frozen=True)
class Form:
    """The size of the benchmark.

    Attributes:
        num_tokens: tokens generated for each row.
        rows_alone: rows in a round of the ways that go one at a time.
        texts: texts read by the ways that take many at once.
        texts_alone: texts in a round of the ways that go one at a time.
        rounds: number of rounds.
        batch_sizes: sizes tried for batched hooks, for rows and for texts.
        trial_tokens: tokens generated for each row while trying.
    """

    num_tokens: int
    rows_alone: int
    texts: int
    texts_alone: int
    rounds: int
    batch_sizes: tuple[int, ...]
    trial_tokens: int


FULL = Form(
    num_tokens=200, rows_alone=1, texts=100, texts_alone=25, rounds=5, batch_sizes=(16, 32, 75), trial_tokens=32
)
SMALL = Form(num_tokens=16, rows_alone=1, texts=12, texts_alone=3, rounds=5, batch_sizes=(75,), trial_tokens=6)

Way = Callable[[HookedModel, int], float]
"""Does a piece of work with a model and a batch size; returns its rate."""


@dataclass(frozen=True)
class Choice:
    """The fastest of the settings that were tried.

    Attributes:
        dtype: of the model.
        size: of a batch.
        tried: "dtype, size" -> its rate; empty if there was only one setting.
    """

    dtype: str
    size: int
    tried: dict[str, float]


def main() -> None:
    """Check that hooks and engine agree, measure both parts, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer tokens, rows, texts and rounds")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    parser.add_argument("--model", default=None, help="checkpoint folder; default: the demo model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--max-num-batched-tokens", type=int, default=None, help="default: vLLM's own")
    arguments = parser.parse_args()
    form = SMALL if arguments.small else FULL
    model = arguments.model or str(demo_model_path())
    work = paper_work(model)

    vllm_024.install()
    llm = start_engine(model, arguments.device, arguments.max_num_batched_tokens)
    register_directions(llm, [Direction("paper", STEERED_LAYER, work.direction_D)])
    # float32 is faster on some CPUs, and never on a GPU.
    fastest = fastest_dtype(arguments.device)
    dtypes = ["bfloat16", "float32"] if fastest == "bfloat16" and arguments.device == "cpu" else [fastest]
    models = {dtype: HookedModel(model, getattr(torch, dtype), arguments.device) for dtype in dtypes}

    rounding = models.get("bfloat16") or HookedModel(model, torch.bfloat16, arguments.device)
    differences = compare(llm, rounding, work)
    print(f"relative differences from hooks in float32: {differences}", flush=True)
    for name, of in differences.items():
        if of["ours"] > WORSE * of["hooks"]:
            sys.exit(f"hooks and ours do not compute the same {name}; allowed: {WORSE:g} times the hooks' difference.")

    measured = {"grid": grid(llm, models, work, form), "extraction": extraction(llm, models, work, form)}
    if arguments.out:
        record.write(
            arguments.out,
            {"differences": differences, **measured},
            model="demo model" if arguments.model is None else arguments.model,
            form=asdict(form),
            threads=torch.get_num_threads(),
            prompt_tokens=sorted({len(row.prompt) for row in work.rows}),
            tokens_a_text=float(np.mean([len(text) for text in work.texts])),
        )


def grid(llm: Any, models: dict[str, HookedModel], work: PaperWork, form: Form) -> dict[str, Any]:
    """Tokens per second of each way on the grid."""
    # The sample of the ways that go one at a time: one row per scenario, with the middle α.
    sample = [work.rows[index] for index in (12, 37, 62)[: form.rows_alone]]

    def trying(rows: Sequence[Row], *, use_cache: bool = True) -> Way:
        return lambda hooked, size: hooks_generate(hooked, rows[:size], size, work, form.trial_tokens, use_cache)

    paper = fastest(trying(sample, use_cache=False), models, [1])
    choices = {
        "paper": paper,
        "cached": fastest(trying(sample), models, [1]),
        "batched": fastest(trying(work.rows), {paper.dtype: models[paper.dtype]}, form.batch_sizes),
    }
    ways: dict[str, Callable[[], float]] = {"ours": lambda: generate(llm, work.rows, form.num_tokens)}
    for name, choice in choices.items():
        rows = work.rows if name == "batched" else sample
        ways[name] = partial(
            hooks_generate, models[choice.dtype], rows, choice.size, work, form.num_tokens, name != "paper"
        )
    generate(llm, work.rows, form.trial_tokens)  # warm-up, compilation included
    return compared("grid, tokens/s", ways, choices, form.rounds)


def extraction(llm: Any, models: dict[str, HookedModel], work: PaperWork, form: Form) -> dict[str, Any]:
    """Texts per second of each way of reading."""
    texts, sample = work.texts[: form.texts], work.texts[: form.texts_alone]
    sizes = [size for size in (2, 4, *form.batch_sizes) if size <= len(texts)]
    paper = fastest(lambda hooked, _: hooks_read_alone(hooked, sample[:4]), models, [1])
    choices = {
        "paper": paper,
        "batched": fastest(
            lambda hooked, size: hooks_read(hooked, texts[:size], size), {paper.dtype: models[paper.dtype]}, sizes
        ),
    }
    ways: dict[str, Callable[[], float]] = {
        "ours": lambda: rate_of(lambda: len(read(llm, texts))),
        "paper": partial(hooks_read_alone, models[choices["paper"].dtype], sample),
        "batched": partial(hooks_read, models[choices["batched"].dtype], texts, choices["batched"].size),
    }
    read(llm, texts)  # warm-up
    return compared("extraction, texts/s", ways, choices, form.rounds)


def fastest(way: Way, models: dict[str, HookedModel], sizes: Sequence[int]) -> Choice:
    """Warm up, then try every model with every batch size; with only one of each, nothing is tried."""
    for hooked in models.values():
        way(hooked, min(sizes))
    candidates = [(dtype, size) for dtype in models for size in sizes]
    if len(candidates) == 1:
        return Choice(*candidates[0], {})
    rates = {(dtype, size): way(models[dtype], size) for dtype, size in candidates}
    dtype, size = max(rates, key=lambda key: rates[key])
    print(f"hooks tried: {rates}", flush=True)
    return Choice(dtype, size, {f"{dtype}, {size}": rate for (dtype, size), rate in rates.items()})


def compared(
    title: str, ways: dict[str, Callable[[], float]], choices: dict[str, Choice], num_rounds: int
) -> dict[str, Any]:
    """Measure all ways in turn and print their figures; this part of the record."""
    rounds = in_turn(ways, num_rounds)
    to_paper, to_batched = figures(rounds, "paper"), figures(rounds, "batched")
    print(f"\n{title:24} {'median':>10} {'to paper':>10} {'to batched':>11}   hooks")
    for name, figure in to_paper.items():
        hooks = f"{choices[name].dtype}, batches of {choices[name].size}" if name in choices else ""
        print(f"{name:24} {figure.median:10.2f} {figure.ratio:10.2f} {to_batched[name].ratio:11.2f}   {hooks}")
    sys.stdout.flush()
    return {
        "figures": {name: asdict(figure) for name, figure in to_paper.items()},
        "figures_to_batched": {name: asdict(figure) for name, figure in to_batched.items()},
        "rounds": rounds,
        "hooks": {name: asdict(choice) for name, choice in choices.items()},
    }


def hooks_generate(
    hooked: HookedModel, rows: Sequence[Row], size: int, work: PaperWork, num_tokens: int, use_cache: bool
) -> float:
    """Tokens per second of hooks, with the rows in batches of `size`."""

    def generate_all() -> int:
        return sum(
            hooked.generate(
                [row.prompt for row in batch],
                [row.alpha for row in batch],
                work.direction_D,
                STEERED_LAYER,
                num_tokens=num_tokens,
                use_cache=use_cache,
            )
            for batch in batches(rows, size)
        )

    return rate_of(generate_all)


def hooks_read(hooked: HookedModel, texts: Sequence[Sequence[int]], size: int) -> float:
    """Texts per second of hooks, in batches of `size`, with texts of similar length together."""
    by_length = sorted(texts, key=len)
    return rate_of(lambda: sum(len(hooked.read_batch(batch, LAYERS)) for batch in batches(by_length, size)))


def hooks_read_alone(hooked: HookedModel, texts: Sequence[Sequence[int]]) -> float:
    """Texts per second of hooks, one text at a time."""
    return rate_of(lambda: len([hooked.read_alone(text, LAYERS) for text in texts]))


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cut `items` into batches of `size`; the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def rate_of(work: Callable[[], int]) -> float:
    """The count that `work` returns, per second of its run."""
    start = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - start)


def start_engine(model: str, device: str, max_num_batched_tokens: int | None) -> Any:
    """A compiled engine with room for the whole grid at once, next to the hooks' model on the same device."""
    optional: dict[str, Any] = (
        {} if max_num_batched_tokens is None else {"max_num_batched_tokens": max_num_batched_tokens}
    )
    return load_llm(
        model,
        layers=LAYERS,
        dtype=fastest_dtype(device),
        **COMPILED_WITH,
        kv_cache_memory_bytes=(2 if device == "cpu" else 8) << 30,
        skip_tokenizer_init=not has_tokenizer(model),
        seed=0,
        **optional,
    )


def generate(llm: Any, rows: Sequence[Row], num_tokens: int) -> float:
    """Tokens per second of the engine, with all rows in one call and an empty prefix cache."""
    params = [
        steered(
            {"temperature": 0.7, "max_tokens": num_tokens, "ignore_eos": True, "detokenize": False},
            [Steering("paper", row.alpha, layer=STEERED_LAYER)],
        )
        for row in rows
    ]
    requests = [{"prompt_token_ids": list(row.prompt)} for row in rows]
    llm.reset_prefix_cache()
    return rate_of(
        lambda: sum(len(output.outputs[0].token_ids) for output in llm.generate(requests, params, use_tqdm=False))
    )


def read(
    llm: Any, texts: Sequence[Sequence[int]], layers: Sequence[int] = LAYERS, steering: Sequence[Steering] = ()
) -> list[Means]:
    """Means over all tokens of every text, from one call of the engine."""
    params = steered({"max_tokens": 1, "temperature": 0.0, "detokenize": False}, steering, Readout(layers))
    outputs = llm.generate([{"prompt_token_ids": list(text)} for text in texts], params, use_tqdm=False)
    return [result.mean for (result,) in collect_readouts(llm, outputs) if result is not None]


def compare(llm: Any, hooked: HookedModel, work: PaperWork) -> dict[str, dict[str, float]]:
    """The largest relative differences of ours, and of hooks in bfloat16, from hooks in float32.

    "means" compares the means of some texts at every layer; "shifts" compares the change of these means under steering
    at one layer, at that layer and those after it.
    """
    texts, direction_D = work.texts[:4], work.direction_D

    def by_hooks(alpha: float) -> list[Means]:
        alphas = [alpha] * len(texts)
        return hooked.read_batch(texts, LAYERS, alphas=alphas, direction_D=direction_D, steered_layer=STEERED_LAYER)

    with hooked.in_float32():
        exact = by_hooks(0.0)
        alpha = float(np.linalg.norm(exact[0][STEERED_LAYER]))  # as large as the residual stream itself
        exact_steered = by_hooks(alpha)
    plain = {"ours": read(llm, texts), "hooks": by_hooks(0.0)}
    steering = [Steering("paper", alpha, layer=STEERED_LAYER)]
    steered_ = {"ours": read(llm, texts, steering=steering), "hooks": by_hooks(alpha)}
    places = [(text, layer) for text in range(len(texts)) for layer in LAYERS]

    def shift(after: list[Means], before: list[Means], text: int, layer: int) -> Any:
        return after[text][layer] - before[text][layer]

    return {
        "means": {
            name: max(relative(found[text][layer], exact[text][layer]) for text, layer in places)
            for name, found in plain.items()
        },
        "shifts": {
            name: max(
                relative(shift(found, plain[name], *place), shift(exact_steered, exact, *place))
                for place in places
                if place[1] >= STEERED_LAYER
            )
            for name, found in steered_.items()
        },
    }


def relative(vector_D: Any, reference_D: Any) -> float:
    """Distance of two (D,) vectors, relative to the norm of the reference."""
    return float(np.linalg.norm(vector_D - reference_D) / np.linalg.norm(reference_D))


if __name__ == "__main__":
    main()
