"""Checkpoints of random weights, so that engine and hooks can load the same weights without a real model.

    python -m benchmarks.harness.random_checkpoint FOLDER --shape qwen2.5-7b

Weights are drawn on the GPU if there is one. They are the same at every call on the same kind of device.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
    # As small as an engine accepts; the vocabulary size is the demo model's, so that its tokenizer fits.
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
    },
}


def save_random_checkpoint(folder: Path, shape: str, tokenizer: Path | None = None) -> Path:
    """Write a bf16 Qwen2 of random weights in `shape`, a key of SHAPES, to `folder` and return it.

    `tokenizer`: folder of a checkpoint whose tokenizer is copied; None leaves the checkpoint without one.
    """
    config = Qwen2Config(**SHAPES[shape], bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (tokenizer / name).exists():
                shutil.copy(tokenizer / name, folder / name)
    return folder


def main() -> None:
    """Write the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    arguments = parser.parse_args()
    save_random_checkpoint(arguments.folder, arguments.shape)


if __name__ == "__main__":
    main()
