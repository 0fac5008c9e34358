"""The process of one engine of `peers.bench`: for every line on stdin it does the work once, pausing at every step.

    python -m benchmarks.peers.engine KIND

KIND is "plain", "vllm-steer" or a peer's name. All kinds run the same requests, steered at one layer along one
direction, each with its own α; "plain" runs them unsteered. Decoding is greedy. The answer is a JSON object: "rate" in
tokens/s and "tokens", a digest of the generated tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness.line_process import Pause, serve
from benchmarks.harness.working_time import WorkingTime, pausing

LAYER = 16
NUM_REQUESTS = 64
NUM_TOKENS = 48
PROMPT_TOKENS = 64


def engine(pause: Pause) -> Callable[[str], str]:
    """Start the engine of the KIND in the arguments and warm it up; the function that answers a line."""
    draw = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": ids} for ids in draw.integers(100, 40_000, (NUM_REQUESTS, PROMPT_TOKENS)).tolist()]
    direction_D = draw.standard_normal(576).astype(np.float32)
    direction_D /= np.linalg.norm(direction_D)
    llm, params = start(sys.argv[1], direction_D, np.linspace(-20, 20, NUM_REQUESTS).tolist())

    def work(_: str = "") -> str:
        clock = WorkingTime()
        with pausing(llm, clock, pause):
            outputs = llm.generate(prompts, params, use_tqdm=False)
        clock.stop()
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        rate = sum(map(len, tokens)) / clock.at(time.monotonic())
        return json.dumps({"rate": rate, "tokens": sha256(json.dumps(tokens).encode()).hexdigest()})

    llm.generate(prompts, params, use_tqdm=False)  # warm-up
    return work


def start(kind: str, direction_D: Any, alphas: list[float]) -> tuple[LLM, list[SamplingParams]]:
    """Start the engine as the documentation of `kind` says; the engine and one SamplingParams per α."""
    engine: dict[str, Any] = {
        "model": str(demo_model_path()),
        "dtype": "bfloat16",
        "max_model_len": 512,
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
    }
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    if kind == "vllm-steer":
        from vllm_steer import Direction, Steering, load_llm, register_directions, steered

        llm = load_llm(layers=[LAYER], **engine)
        register_directions(llm, [Direction("noise", LAYER, direction_D)])
        return llm, [steered(sampling, [Steering("noise", alpha)]) for alpha in alphas]
    if kind == "vllm-lens":
        from vllm_lens import SteeringVector  # type: ignore[import-not-found]  # only where that peer is installed

        vector_1D = torch.as_tensor(direction_D).unsqueeze(0)
        return LLM(**engine), [
            SamplingParams(
                **sampling,
                extra_args={
                    "apply_steering_vectors": [
                        SteeringVector(activations=vector_1D, layer_indices=[LAYER], scale=alpha)
                    ]
                },
            )
            for alpha in alphas
        ]
    if kind == "hotwire-vllm":
        torch.save(torch.as_tensor(direction_D), os.environ["HOTWIRE_VECTORS"])  # the file's name names the vector
        return LLM(**engine), [
            SamplingParams(
                **sampling, extra_args={"hotwire": json.dumps({"id": "vector", "layer": LAYER, "scale": alpha})}
            )
            for alpha in alphas
        ]
    return LLM(**engine), [SamplingParams(**sampling) for _ in alphas]


if __name__ == "__main__":
    serve(engine)
