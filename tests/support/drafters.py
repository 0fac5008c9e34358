"""What speculative decoding needs in tests: a target that can be guessed, tiny random drafters for it, and a count.

A random model hardly ever repeats itself, and no other one guesses its next token. With few words either happens now
and then: some drafts are accepted and some are rejected.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.v1.core.sched.scheduler import Scheduler

from tests.support.tiny_models import (
    HEAD_SIZE,
    HIDDEN_SIZE,
    INIT_STD,
    NUM_KV_HEADS,
    NUM_LAYERS,
    VOCAB_SIZE,
    save_tiny_model,
    tiny_config,
)

NUM_WORDS = 8
# Of the layers whose output EAGLE-3 reads. vLLM counts the layers before a stream: 1 is the output of layer 0.
EAGLE3_LAYERS = (0, 2, NUM_LAYERS - 1)

Tensors = dict[str, torch.Tensor]


def save_target(family: str, tokenizer_dir: Path, target: Path, seed: int = 0) -> Path:
    """Write a tiny model whose head's rows are zero except for the first `NUM_WORDS` words."""
    save_tiny_model(family, tokenizer_dir, target, seed)
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"][NUM_WORDS:] = 0
    return _save(target, weights)


def save_eagle_head(target: Path) -> Path:
    """Write an EAGLE head for the tiny llama, which shares its embeddings and head."""
    random = _Random()
    weights = _block("layers.0.", HIDDEN_SIZE, random) | {"fc.weight": random(HIDDEN_SIZE, 2 * HIDDEN_SIZE)}
    return _save(target, weights, _one_layer_config())


def save_eagle3_head(target: Path) -> Path:
    """Write an EAGLE-3 head for the tiny llama, which knows `NUM_WORDS` words and reads `EAGLE3_LAYERS`."""
    random = _Random()
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "norm")
    weights = (
        _block("midlayer.", 2 * HIDDEN_SIZE, random)
        | {f"{name}.weight": torch.ones(HIDDEN_SIZE) for name in norms}
        | {"fc.weight": random(HIDDEN_SIZE, len(EAGLE3_LAYERS) * HIDDEN_SIZE)}
        | {"lm_head.weight": random(NUM_WORDS, HIDDEN_SIZE), "d2t": torch.zeros(NUM_WORDS, dtype=torch.int64)}
    )
    config = _one_layer_config() | {"draft_vocab_size": NUM_WORDS}
    return _save(target, weights, config | {"eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in EAGLE3_LAYERS]})


def save_medusa_heads(target: Path, num_heads: int) -> Path:
    """Write Medusa heads for a tiny model, one for each draft of a step."""
    random = _Random()
    weights: Tensors = {}
    for head in range(num_heads):
        weights[f"blocks.{head}.layers.0.weight"] = random(HIDDEN_SIZE, HIDDEN_SIZE)
        weights[f"lm_heads.{head}.weight"] = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)
        weights[f"lm_heads.{head}.weight"][:NUM_WORDS] = random(NUM_WORDS, HIDDEN_SIZE)
    sizes = {"hidden_size": HIDDEN_SIZE, "vocab_size": VOCAB_SIZE, "truncated_vocab_size": VOCAB_SIZE}
    heads = {"num_heads": num_heads, "num_hidden_layers": 1, "max_seq_len": 512}
    return _save(target, weights, {"model_type": "medusa", "architectures": ["MedusaModel"]} | sizes | heads)


def add_mtp_layer(target: Path) -> Path:
    """Add a layer that predicts the token after the next to a checkpoint of GLM-4 MoE or DeepSeek-V3."""
    random = _Random()
    weights = load_file(target / "model.safetensors")
    last, added = f"model.layers.{NUM_LAYERS - 1}.", f"model.layers.{NUM_LAYERS}."
    weights |= {
        added + name.removeprefix(last): tensor.clone() for name, tensor in weights.items() if name.startswith(last)
    }
    weights |= {f"{added}{name}.weight": torch.ones(HIDDEN_SIZE) for name in ("enorm", "hnorm", "shared_head.norm")}
    weights[f"{added}eh_proj.weight"] = random(HIDDEN_SIZE, 2 * HIDDEN_SIZE)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    return _save(target, weights, config | {"num_nextn_predict_layers": 1})


def count_drafts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of accepted, rejected and filler drafts from now on, and of preemptions after a generated token."""
    counts: Counter[str] = Counter()
    update, preempt = Scheduler.update_from_output, Scheduler._preempt_request

    def counting_update(self: Scheduler, scheduled: Any, output: Any) -> Any:
        for request_id, drafts in scheduled.scheduled_spec_decode_tokens.items():
            proposed = sum(draft >= 0 for draft in drafts)  # -1 fills a step up and is never accepted
            accepted = len(output.sampled_token_ids[output.req_id_to_index[request_id]]) - 1
            counts["accepted"] += accepted
            counts["rejected"] += proposed - accepted
            counts["fillers"] += len(drafts) - proposed
        return update(self, scheduled, output)

    def counting_preempt(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> None:
        counts["preempted"] += request.num_output_tokens > 0
        preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "update_from_output", counting_update)
    monkeypatch.setattr(Scheduler, "_preempt_request", counting_preempt)
    return counts


class _Random:
    """Random weights, the same in each run."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator) * INIT_STD


def _one_layer_config() -> dict[str, Any]:
    fields: dict[str, Any] = tiny_config("llama").to_dict()
    return fields | {"num_hidden_layers": 1, "dtype": "float32"}


def _block(prefix: str, attention_input: int, random: _Random) -> Tensors:
    """A decoder layer of llama without the norm before its attention."""
    keys = NUM_KV_HEADS * HEAD_SIZE
    shapes = {
        "self_attn.q_proj": (HIDDEN_SIZE, attention_input),
        "self_attn.k_proj": (keys, attention_input),
        "self_attn.v_proj": (keys, attention_input),
        "self_attn.o_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
        "mlp.gate_proj": (2 * HIDDEN_SIZE, HIDDEN_SIZE),
        "mlp.up_proj": (2 * HIDDEN_SIZE, HIDDEN_SIZE),
        "mlp.down_proj": (HIDDEN_SIZE, 2 * HIDDEN_SIZE),
    }
    weights = {f"{prefix}{name}.weight": random(*shape) for name, shape in shapes.items()}
    return weights | {f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN_SIZE)}


def _save(target: Path, weights: Tensors, config: dict[str, Any] | None = None) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    if config is not None:
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target
