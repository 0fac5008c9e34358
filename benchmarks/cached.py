"""The cost of readouts on a prompt that is in the prefix cache, against a plain request on the same prompt.

    python -m benchmarks.cached [--small] [--out FILE]

One engine, one request at a time: a prompt of --prompt-tokens, of which all full blocks are cached, and --tokens
generated ones. The ways take turns within a round, and time includes collecting the readout. A readout over all tokens
adds up the sums that the first one has left for the cached blocks. A trace over all tokens needs each of them computed:
that is what a readout cost before such sums were kept.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's steps without another process's waiting
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from vllm import LLM, SamplingParams

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.rounds import figures, in_turn, interval
from vllm_steer import Direction, Readout, collect_readouts, register_directions, steer_config, steered

PLAIN = "plain"
GOALS = {"readout, generated": 1.1, "trace, generated": 1.1, "readout, all": 1.5}
NAME = "direction"


def main() -> None:
    """Measure all ways in turn, print their times and ratios, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer rounds")
    parser.add_argument("--model", type=Path, default=None, help="folder of a checkpoint; default: the demo model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 12, 16, 20, 24], help="hooked and read")
    parser.add_argument("--prompt-tokens", type=int, default=1603)
    parser.add_argument("--tokens", type=int, default=4, help="generated")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    if parser.parse_known_args()[0].small:
        parser.set_defaults(rounds=12, eager=True)
    arguments = parser.parse_args()
    model = arguments.model or demo_model_path()
    llm = LLM(
        str(model),
        dtype=arguments.dtype,
        enforce_eager=arguments.eager,
        block_size=arguments.block_size,
        max_model_len=arguments.prompt_tokens + arguments.tokens + 1,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=True,
        seed=0,
        additional_config=steer_config(layers=arguments.layers),
    )
    rng = np.random.default_rng(0)
    layer = arguments.layers[-1]
    vector = rng.standard_normal(llm.llm_engine.model_config.get_hidden_size())
    register_directions(llm, [Direction(NAME, layer, vector).normalised()])
    prompt = rng.integers(100, 10_000, arguments.prompt_tokens).tolist()

    readouts = {
        PLAIN: None,
        "readout, generated": Readout(arguments.layers, "generated"),
        "trace, generated": Readout([layer], "generated", trace=[NAME]),
        "readout, all": Readout(arguments.layers, "all"),
        "trace, all": Readout([layer], "all", trace=[NAME]),
    }
    cached: dict[str, int | None] = {}

    def seconds(name: str) -> float:
        began = time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
        readout = readouts[name]
        asked = params if readout is None else steered(params, [], readout)
        outputs = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        if readout is not None:
            collect_readouts(llm, outputs)
        cached[name] = outputs[0].num_cached_tokens
        return time.perf_counter() - began

    ways = {name: partial(seconds, name) for name in readouts}
    in_turn(ways, 2)  # fills the cache and the sums, and warms up
    found = figures(in_turn(ways, arguments.rounds), PLAIN)
    measured = {}
    for name, figure in found.items():
        low, high = interval(figure.ratios)
        goal = GOALS.get(name)
        measured[name] = {**asdict(figure), "interval": [low, high], "cached_tokens": cached[name], "goal": goal}
        said = "" if goal is None else f"   goal: at most {goal}: {'met' if high <= goal else 'not met'}"
        print(
            f"{name:20} {1000 * figure.median:8.1f} ms   ratio {figure.ratio:6.3f} ({low:.3f} - {high:.3f})   "
            f"{cached[name]} of {arguments.prompt_tokens} tokens cached{said}"
        )
    if arguments.out is not None:
        about = {name: value for name, value in vars(arguments).items() if name not in ("out", "small")}
        record.write(arguments.out, {"ways": measured}, **about | {"model": model.name})


if __name__ == "__main__":
    main()
