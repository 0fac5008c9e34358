"""Read texts: the mean residual stream of each, its length, and a trace of one text along the difference of two.

python examples/read.py demo-model "I am so sorry." "Noted."
"""

from __future__ import annotations

import argparse

import numpy as np
from vllm import LLM, SamplingParams

from batch_jobs.engine.start_engine import model_location
from vllm_steer import Direction, Readout, collect_readouts, register_directions, steer_config, steered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or demo-model")
    parser.add_argument("texts", nargs="*", default=["I am so sorry, that must hurt.", "Noted. Next item."])
    parser.add_argument("--layer", type=int, default=16)
    given = parser.parse_args()

    llm = LLM(
        model_location(given.model),
        additional_config=steer_config(layers=[given.layer]),
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
    )
    one_token = SamplingParams(max_tokens=1)
    # The first token is an attention sink with a very large norm in many models.
    read = steered(one_token, readout=Readout([given.layer], span="prompt", skip_first=1))
    results = [reads[0] for reads in collect_readouts(llm, llm.generate(given.texts, read))]
    for text, result in zip(given.texts, results, strict=True):
        mean = result.mean[given.layer]
        print(f"{result.num_tokens:4d} tokens  norm {np.linalg.norm(mean):8.2f}  {text!r}")

    difference = results[0].mean[given.layer] - results[-1].mean[given.layer]
    register_directions(llm, [Direction("difference", given.layer, difference).normalised()])
    trace = steered(one_token, readout=Readout([given.layer], span="prompt", trace=["difference"], vectors=False))
    outputs = llm.generate(given.texts[:1], trace)
    values = collect_readouts(llm, outputs)[0][0].trace["difference"]
    tokenizer = llm.get_tokenizer()
    for token, value in zip(outputs[0].prompt_token_ids, values, strict=True):
        print(f"{value:8.2f}  {tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main()
