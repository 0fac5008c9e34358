"""One batch in which every request is treated in its own way: unsteered, steered, read, at several layers.

python examples/mixed_batch.py demo-model
"""

from __future__ import annotations

import argparse

import numpy as np
from vllm import LLM, SamplingParams

from batch_jobs.engine.start_engine import model_location
from vllm_steer import Direction, Readout, Steering, collect_readouts, register_directions, steer_config, steered

PROMPT = "The first thing that I would tell her is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or demo-model")
    parser.add_argument("--layers", type=int, nargs=2, default=[12, 16])
    parser.add_argument("--max-tokens", type=int, default=20)
    given = parser.parse_args()
    low, high = given.layers

    llm = LLM(
        model_location(given.model),
        additional_config=steer_config(layers=given.layers),
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
    )
    size = llm.model_config.get_hidden_size()
    rng = np.random.default_rng(0)
    # Random directions, which mean nothing: this shows the batch, not a concept.
    register_directions(
        llm,
        [
            Direction("first", low, rng.standard_normal(size)).normalised(),
            Direction("second", high, rng.standard_normal(size)).normalised(),
        ],
    )
    plain = SamplingParams(max_tokens=given.max_tokens, temperature=0)
    requests = {
        "unsteered": plain,
        "one entry": steered(plain, [Steering("first", 20.0)]),
        "two layers": steered(plain, [Steering("first", 20.0), Steering("second", -20.0)]),
        "answer only": steered(plain, [Steering("first", 20.0, span="generated")]),
        "ablated": steered(plain, [Steering("second", op="ablate")]),
        "set": steered(plain, [Steering("second", 10.0, op="set")]),
        "read only": steered(plain, readout=Readout([low, high], span="generated", project=["first", "second"])),
        "both": steered(plain, [Steering("second", 20.0)], Readout([high], span="generated", project=["second"])),
    }
    outputs = llm.generate([PROMPT] * len(requests), list(requests.values()))
    for name, output, reads in zip(requests, outputs, collect_readouts(llm, outputs), strict=True):
        projections = {} if reads[0] is None else reads[0].projections
        print(f"{name:12s} {output.outputs[0].text!r} {projections}")


if __name__ == "__main__":
    main()
