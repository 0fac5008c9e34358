"""The process of an ``EngineProcess``: reads one piece of work per line on stdin and answers with a line on stdout.

It reads vLLM's own timestamps (``v1/metrics/stats.py`` and ``outputs.py``, ``RequestOutput.metrics``, vLLM 0.32): the
wall-clock time at which a request arrived in the front end, and the monotonic times at which the engine core made its
first and last token.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import numpy as np
import psutil
import torch
from vllm import LLM, SamplingParams

from benchmarks.harness.engine_process import PLUGIN, Took, Work
from benchmarks.harness.line_process import Pause, serve
from benchmarks.harness.working_time import WorkingTime, pausing

NUM_DIRECTIONS = 8
LARGEST_ALPHA = 60.0
FIRST_WORD = 100  # lower ids are special in the tokenizers used here


class OverheadEngine:
    """An engine and the requests it is measured with.

    Args:
        layers: layers to hook; None leaves steering unconfigured.
        engine_args: passed to ``vllm.LLM``.
        pause: called before every step of the engine if the work has pauses.
    """

    def __init__(self, layers: Sequence[int] | None, engine_args: dict[str, Any], pause: Pause) -> None:
        self._layers = layers
        self._pause = pause
        if layers is None:
            self._llm = LLM(**engine_args)
            assert (PLUGIN in sys.modules) == (os.environ["VLLM_PLUGINS"] == PLUGIN)
        else:
            # Imported here, so that an engine without the plugin does not load its code.
            from vllm_steer import Direction, load_llm, register_directions

            self._llm = load_llm(layers=layers, **engine_args)
            width = self._llm.llm_engine.model_config.get_hidden_size()
            draw = np.random.default_rng(0)
            register_directions(
                self._llm,
                [
                    Direction(_name(number), layer, draw.standard_normal(width)).normalised()
                    for number in range(NUM_DIRECTIONS)
                    for layer in layers
                ],
            )

    def do(self, work: Work) -> Took:
        """Do the work and collect its readouts. The prompts are random tokens, the same at every call."""
        words = self._llm.llm_engine.model_config.get_vocab_size()
        shape = (work.requests, work.prompt_tokens)
        ids = np.random.default_rng(0).integers(FIRST_WORD, words, shape).tolist()
        prompts = [{"prompt_token_ids": row} for row in ids]
        to_monotonic = time.monotonic() - time.time()
        clock = WorkingTime()
        params = self._params(work)
        with pausing(self._llm, clock, self._pause) if work.pauses else nullcontext():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        if work.kind in ("prompt read", "read"):
            from vllm_steer import collect_readouts

            reads = collect_readouts(self._llm, outputs)
            assert all(samples[0] is not None for samples in reads)
        clock.stop()
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert all(len(row) == work.max_tokens for row in tokens)
        steps = max(1, work.max_tokens - 1)
        clocks = [output.metrics for output in outputs]
        return Took(
            laps=clock.laps,
            first_token=statistics.median(
                clock.at(one.first_token_ts) - clock.at(one.arrival_time + to_monotonic) for one in clocks
            ),
            inter_token=statistics.median(
                (clock.at(one.last_token_ts) - clock.at(one.first_token_ts)) / steps for one in clocks
            ),
            tokens=sha256(json.dumps(tokens).encode()).hexdigest(),
            memory_gib=_memory_gib(),
        )

    def _params(self, work: Work) -> list[SamplingParams]:
        """One SamplingParams per request. Steered requests get distinct α, evenly spaced from −60 to 60."""
        plain = [
            SamplingParams(temperature=0, max_tokens=work.max_tokens, ignore_eos=True) for _ in range(work.requests)
        ]
        if work.kind == "plain":
            return plain
        from vllm_steer import Readout, Steering, steered

        assert self._layers is not None
        if work.kind in ("prompt read", "read"):
            readout = Readout(self._layers, span="prompt" if work.kind == "prompt read" else "all")
            return [steered(params, readout=readout) for params in plain]
        alphas = np.linspace(-LARGEST_ALPHA, LARGEST_ALPHA, work.requests).tolist()
        if work.kind == "steered":
            middle = self._layers[len(self._layers) // 2]
            return [
                steered(params, [Steering(_name(0), alpha, layer=middle)])
                for params, alpha in zip(plain, alphas, strict=True)
            ]
        if work.kind == "stacked":
            return [
                steered(
                    params,
                    [
                        Steering(_name(number), alpha, layer=layer)
                        for layer in self._layers
                        for number in range(NUM_DIRECTIONS)
                    ],
                )
                for params, alpha in zip(plain, alphas, strict=True)
            ]
        raise ValueError(f"work of kind {work.kind!r}")


def _name(number: int) -> str:
    return f"noise-{number}"


def _memory_gib() -> dict[str, float]:
    memory = {
        "resident": psutil.Process().memory_info().rss / 2**30,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # Linux counts it in KiB
    }
    if torch.cuda.is_available():
        memory["allocated"] = torch.cuda.max_memory_allocated() / 2**30
        memory["reserved"] = torch.cuda.max_memory_reserved() / 2**30
    return memory


def _engine(pause: Pause) -> Callable[[str], str]:
    if os.environ["VLLM_PLUGINS"] == PLUGIN:
        from benchmarks.gpu import vllm_024  # imports the plugin, so only for engines with it

        vllm_024.install()
    engine = OverheadEngine(**json.loads(sys.argv[1]), pause=pause)
    return lambda line: json.dumps(asdict(engine.do(Work(**json.loads(line)))))


if __name__ == "__main__":
    serve(_engine)
