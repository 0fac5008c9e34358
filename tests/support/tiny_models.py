"""Tiny random checkpoints, one per decoder family, small enough to load in seconds.

Four blocks, hidden size 128. The head size is 32 because that is the smallest one vLLM's CPU attention accepts. The
tokenizer is the first part of the demo model's, the same for all, so the same prompts fit every checkpoint. The whole
tokenizer would take longer to load, and to start an engine with, than everything else in so small a model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

NUM_LAYERS = 4
HIDDEN_SIZE = 128
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_SIZE = HIDDEN_SIZE // NUM_HEADS
NUM_EXPERTS = 6  # more than there are layers: a list of experts must not be taken for the list of layers
VOCAB_SIZE = 4096
MAX_POSITIONS = 512
# Wide enough that logits have a standard deviation well above one: a near-uniform head would make every greedy step
# a near tie and the token comparison worthless.
INIT_STD = 0.15

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}
_ROTARY: dict[str, Any] = _SHARED | {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": INIT_STD,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN_SIZE,
    "norm_topk_prob": True,
}
# Sliding windows shorter than the prompts, as every other layer of these families has them.
_WINDOWED: dict[str, Any] = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_POSITIONS // 4,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
_GEMMA: dict[str, Any] = _WINDOWED | {
    "head_dim": HEAD_SIZE,
    "query_pre_attn_scalar": HEAD_SIZE,
    "tie_word_embeddings": True,  # vLLM's class has no head of its own
    # Scaled embeddings and a tied head repeat the last token for ever, unless the layers outweigh the embeddings.
    "initializer_range": INIT_STD / 3,
}

# family -> Hugging Face class, fields of its config. A family's special features are on, with factors other than 1.
_Families = dict[str, tuple[str, dict[str, Any]]]
_SUPPORTED: _Families = {
    "llama": ("LlamaForCausalLM", _ROTARY),
    "mistral": ("MistralForCausalLM", _ROTARY | {"sliding_window": 32}),
    "qwen2": ("Qwen2ForCausalLM", _ROTARY),
    "qwen3": ("Qwen3ForCausalLM", _ROTARY | {"head_dim": HEAD_SIZE}),
    "phi3": ("Phi3ForCausalLM", _ROTARY | {"original_max_position_embeddings": MAX_POSITIONS}),
    "gemma2": ("Gemma2ForCausalLM", _ROTARY | _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", _ROTARY | _GEMMA),
    "gpt2": (
        "GPT2LMHeadModel",
        _SHARED
        | {"n_embd": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": NUM_HEADS, "n_positions": MAX_POSITIONS}
        | {"initializer_range": INIT_STD},
    ),
    "opt": (
        "OPTForCausalLM",
        _ROTARY | {"ffn_dim": 2 * HIDDEN_SIZE, "word_embed_proj_dim": HIDDEN_SIZE, "init_std": INIT_STD},
    ),
    "granite": (
        "GraniteForCausalLM",
        _ROTARY
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}
        | {"attention_multiplier": 0.25, "logits_scaling": 0.8},
    ),
    "cohere": ("CohereForCausalLM", _ROTARY | {"logit_scale": 1.5, "tie_word_embeddings": True}),
    "stablelm": ("StableLmForCausalLM", _ROTARY),
    "mixtral": (
        "MixtralForCausalLM",
        _ROTARY | {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2},
    ),
    "qwen2moe": ("Qwen2MoeForCausalLM", _ROTARY | _EXPERTS | {"shared_expert_intermediate_size": HIDDEN_SIZE}),
    "qwen3moe": ("Qwen3MoeForCausalLM", _ROTARY | _EXPERTS | {"head_dim": HEAD_SIZE}),
    "gptoss": (
        "GptOssForCausalLM",
        _ROTARY
        | _WINDOWED
        | {"head_dim": HEAD_SIZE, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
        | {"rope_parameters": _YARN},
    ),
    # One head: vLLM 0.32's CPU kernel rotates queries of this shape wrongly where there are several.
    "deepseekv2": (
        "DeepseekV2ForCausalLM",
        _ROTARY
        | {"num_attention_heads": 1, "num_key_value_heads": 1, "kv_lora_rank": 64, "q_lora_rank": None}
        | {"qk_rope_head_dim": HEAD_SIZE, "qk_nope_head_dim": HEAD_SIZE, "v_head_dim": HEAD_SIZE}
        | {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"n_shared_experts": 1, "moe_intermediate_size": HIDDEN_SIZE, "first_k_dense_replace": 1}
        | {"routed_scaling_factor": 2.0},
    ),
    # What vLLM runs through Hugging Face's own modules:
    "olmo2": ("Olmo2ForCausalLM", _ROTARY),
    "gptneox": ("GPTNeoXForCausalLM", _ROTARY | {"num_key_value_heads": NUM_HEADS}),
    "phi": ("PhiForCausalLM", _ROTARY),
}
_REFUSED: _Families = {
    "bloom": ("BloomForCausalLM", _SHARED | {"hidden_size": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": NUM_HEADS}),
}
SUPPORTED_FAMILIES = tuple(_SUPPORTED)
REFUSED_FAMILIES = tuple(_REFUSED)


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a tiny model of `family`.

    Raises:
        KeyError: the family is not in the tables.
    """
    name, fields = (_SUPPORTED | _REFUSED)[family]
    config: PreTrainedConfig = getattr(transformers, name).config_class(**fields, architectures=[name])
    return config


def save_tiny_model(family: str, tokenizer_dir: Path | None, target: Path, seed: int = 0) -> Path:
    """Write a random float32 checkpoint of `family` to `target`, with the first words of `tokenizer_dir`'s tokenizer.

    Norm weights and biases are random too: left at ones and zeros they would hide a stream that skips a norm or
    drops a bias.

    Args:
        tokenizer_dir: None leaves the checkpoint without a tokenizer, for machines that have no other model either.

    Returns:
        `target`.

    Raises:
        KeyError: the family is not in the tables.
    """
    config = tiny_config(family)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, config.architectures[0])(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config.dtype = "float32"
    model.save_pretrained(target)
    if tokenizer_dir is None:
        return target
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_dir / name).exists():
            shutil.copy(tokenizer_dir / name, target / name)
    (target / "tokenizer.json").write_text(_first_words(tokenizer_dir / "tokenizer.json"), encoding="utf-8")
    return target


def _first_words(tokenizer: Path) -> str:
    """A byte-pair `tokenizer` as it was after learning `VOCAB_SIZE` words, which can still encode every text."""
    whole = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = whole["model"]
    model["vocab"] = {word: token for word, token in model["vocab"].items() if token < VOCAB_SIZE}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return json.dumps(whole)
