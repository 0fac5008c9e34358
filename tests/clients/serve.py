"""``python -m tests.clients.serve FOLDER ALIAS ALPHA``: vLLM's server with a tiny model, until stdin ends.

It runs in the project's own environment, which has the engine. One line of JSON says where the server listens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from batch_jobs.demo_model import demo_model_path
from tests.server.conftest import KIND_LAYER, OTHER_LAYER, running_server, save_two_directions
from tests.support.tiny_models import save_tiny_model


def main(folder: Path, alias: str, alpha: float) -> None:
    """Serve a tiny llama as "tiny", with "kind" at a hooked layer, and as ``alias``, steered to "kind" by ``alpha``."""
    model = save_tiny_model("llama", demo_model_path(), folder / "model")
    save_two_directions(folder / "directions.safetensors")
    settings = {
        "layers": [OTHER_LAYER, KIND_LAYER],
        "directions": [str(folder / "directions.safetensors")],
        "steering_in_model_names": True,
        "served_aliases": {alias: [{"direction": "kind", "alpha": alpha}]},
    }
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--enable-tokenizer-info-endpoint",
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
    )
    with running_server(command, folder / "server.log", VLLM_PLUGINS="vllm_steer") as url:
        print(json.dumps({"url": url, "tokenizer": str(model), "layer": KIND_LAYER}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
