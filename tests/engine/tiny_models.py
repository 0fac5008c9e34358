"""Tiny random checkpoints, one per decoder family, small enough to load in seconds.

Four blocks, hidden size 128. The head size is 32 because that is the smallest one vLLM's CPU attention accepts. The
vocabulary and tokenizer are those of the demo model, so the same prompts fit every checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

NUM_LAYERS = 4
HIDDEN_SIZE = 128
NUM_HEADS = 4
NUM_KV_HEADS = 2
VOCAB_SIZE = 49152  # the demo model's tokenizer
MAX_POSITIONS = 512
# Wide enough that logits have a standard deviation well above one: a near-uniform head would make every greedy step
# a near tie and the token comparison worthless.
INIT_STD = 0.15

SUPPORTED_FAMILIES = ("llama", "qwen2", "phi3", "gpt2")
# Runs in vLLM, but its decoder layers return (h, residual) where the second element is not part of the stream.
UNSUPPORTED_FAMILY = "stablelm"

_ROTARY_SHAPE: dict[str, object] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": MAX_POSITIONS,
}
_SHARED: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "initializer_range": INIT_STD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}
_UNTIED: dict[str, object] = {"tie_word_embeddings": False}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_ROTARY_SHAPE, **_SHARED, **_UNTIED))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_ROTARY_SHAPE, **_SHARED, **_UNTIED))


def _phi3() -> PreTrainedModel:
    config = Phi3Config(**_ROTARY_SHAPE, **_SHARED, **_UNTIED, original_max_position_embeddings=MAX_POSITIONS)
    return Phi3ForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_positions=MAX_POSITIONS, **_SHARED)
    return GPT2LMHeadModel(config)


def _stablelm() -> PreTrainedModel:
    return StableLmForCausalLM(StableLmConfig(**_ROTARY_SHAPE, **_SHARED, **_UNTIED))


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "stablelm": _stablelm,
}


def save_tiny_model(family: str, tokenizer_dir: Path, target: Path, seed: int = 0) -> Path:
    """Write a random float32 checkpoint of `family` with the tokenizer of `tokenizer_dir` to `target`.

    Norm weights and biases are random too: left at ones and zeros they would hide a stream that skips a norm or
    drops a bias. Returns `target`; raises KeyError for a family without a builder.
    """
    build = _BUILDERS[family]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config: PreTrainedConfig = model.config
    config.dtype = "float32"
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_dir / name).exists():
            shutil.copy(tokenizer_dir / name, target / name)
    return target
