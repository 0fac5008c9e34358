"""Steer one prompt along a direction made from two texts, at three strengths in one batch.

python examples/steer.py demo-model
python examples/steer.py Qwen/Qwen2.5-7B-Instruct --layer 20 --alpha 20
"""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams

from batch_jobs.engine.start_engine import model_location
from vllm_steer import Direction, Readout, Steering, collect_readouts, register_directions, steer_config, steered

WARM = "I am so sorry, that must hurt. I am here with you."
COLD = "Noted. Proceed to the next item on the list."
PROMPT = "My friend told me that her cat has died, and I said:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or demo-model")
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=40.0)
    parser.add_argument("--max-tokens", type=int, default=40)
    given = parser.parse_args()

    llm = LLM(
        model_location(given.model),
        additional_config=steer_config(layers=[given.layer]),
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,  # starts sooner; without it the model is compiled, steering and readout included
    )
    read = steered(SamplingParams(max_tokens=1), readout=Readout([given.layer], skip_first=1))
    warm, cold = (reads[0].mean[given.layer] for reads in collect_readouts(llm, llm.generate([WARM, COLD], read)))
    register_directions(llm, [Direction("kind", given.layer, warm - cold).normalised()])

    alphas = (-given.alpha, 0.0, given.alpha)
    sampling = SamplingParams(max_tokens=given.max_tokens, seed=1)
    readout = Readout([given.layer], span="all", project=["kind"])
    outputs = llm.generate(
        [PROMPT] * len(alphas), [steered(sampling, [Steering("kind", alpha)], readout) for alpha in alphas]
    )
    for alpha, output, reads in zip(alphas, outputs, collect_readouts(llm, outputs), strict=True):
        projection = reads[0].projections["kind"][given.layer]
        print(f"alpha {alpha:6.1f}  projection {projection:8.2f}  {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
