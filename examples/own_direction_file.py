"""Steer with a direction file of your own: .safetensors, .gguf (a control vector) or .npy (one vector).

python examples/own_direction_file.py demo-model runs/demo/directions.safetensors --name empathy
python examples/own_direction_file.py demo-model vector.npy --name mine --layer 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

from batch_jobs.engine.start_engine import model_location
from vllm_steer import Steering, load_directions, register_directions, steer_config, steered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or demo-model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--name", required=True, help="of the direction; a .npy file holds none")
    parser.add_argument("--layer", type=int, default=None, help="of the direction; a .npy file holds none")
    parser.add_argument("--alpha", type=float, default=20.0)
    parser.add_argument("--prompt", default="How was your day?")
    parser.add_argument("--max-tokens", type=int, default=40)
    given = parser.parse_args()

    is_npy = given.file.suffix == ".npy"
    found = load_directions(given.file, **({"name": given.name, "layer": given.layer} if is_npy else {}))
    # α multiplies the vector as it is; with length 1 it means the same for every file.
    chosen = [one.normalised() for one in found if one.name == given.name and given.layer in (None, one.layer)]
    if not chosen:
        raise SystemExit(f"{given.file} holds {', '.join(one.key for one in found)}; choose one of these")
    layer = chosen[0].layer

    llm = LLM(
        model_location(given.model),
        additional_config=steer_config(layers=[layer]),
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
    )
    register_directions(llm, chosen[:1])
    sampling = SamplingParams(max_tokens=given.max_tokens, temperature=0)
    alphas = (-given.alpha, 0.0, given.alpha)
    params = [steered(sampling, [Steering(given.name, alpha, layer)]) for alpha in alphas]
    for alpha, output in zip(alphas, llm.generate([given.prompt] * len(alphas), params), strict=True):
        print(f"alpha {alpha:6.1f}  {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
