"""Tiny random checkpoints, small enough to load in seconds, of every architecture that is compared.

The tokenizer is the first part of the demo model's, the same for all, so the same prompts fit every checkpoint. The
whole tokenizer would take longer to load, and to start an engine with, than everything else in so small a model.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.architectures import ARCHITECTURES
from tests.support.tiny_configs import (
    FAMILIES,
    HEAD_SIZE,
    HIDDEN_SIZE,
    INIT_STD,
    MAX_POSITIONS,
    NUM_EXPERTS,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    REFUSED,
    VOCAB_SIZE,
    Fields,
    small_config,
)

__all__ = [
    "HEAD_SIZE",
    "HIDDEN_SIZE",
    "INIT_STD",
    "MAX_POSITIONS",
    "NUM_EXPERTS",
    "NUM_HEADS",
    "NUM_KV_HEADS",
    "NUM_LAYERS",
    "REFUSED_FAMILIES",
    "SUPPORTED_FAMILIES",
    "VOCAB_SIZE",
    "hf_class",
    "save_tiny_model",
    "tiny_config",
]

_SUPPORTED = FAMILIES
SUPPORTED_FAMILIES = tuple(_SUPPORTED)
REFUSED_FAMILIES = tuple(REFUSED)
# Constants of a recurrence, which are far from zero and decay or explode with noise of this size.
_NOT_RANDOM = ("A_log", "dt_bias")
# transformers writes these experts transposed; released checkpoints and vLLM have them as its modules do.
_TRANSPOSED_EXPERTS = ("Qwen3VLMoeForConditionalGeneration",)


def hf_class(name: str) -> Any:
    """The model class of transformers of that name, whether exported at the top or not.

    Raises:
        KeyError: transformers has no such class.
    """
    if hasattr(transformers, name):
        return getattr(transformers, name)
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if f"class {name}(" in file.read_text(encoding="utf-8"):
            return getattr(importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}"), name)
    raise KeyError(name)


def tiny_config(family: str, changes: Fields | None = None) -> PreTrainedConfig:
    """The config of a tiny model of `family`, an architecture or a short name of one.

    Args:
        changes: fields over those of the architecture's row, of nested configs under their names.

    Raises:
        KeyError: the family is not in the tables.
    """
    if family in _SUPPORTED or family in REFUSED:
        name, fields = (_SUPPORTED | REFUSED)[family]
        config: PreTrainedConfig = getattr(transformers, name).config_class(**fields, architectures=[name])
        return config
    row = ARCHITECTURES[family]
    name = row.name or family
    config_class = hf_class(row.hf_class or name).config_class
    fields = _merged(row.fields, changes or {})
    fields = fields if row.whole else small_config(config_class, fields)
    config = config_class(**(fields | {"dtype": "float32"}))
    config.architectures = [name]
    return config


def _merged(fields: Fields, changes: Fields) -> Fields:
    nested = {name: _merged(fields.get(name, {}), one) for name, one in changes.items() if isinstance(one, dict)}
    return fields | changes | nested


def save_tiny_model(
    family: str, tokenizer_dir: Path | None, target: Path, seed: int = 0, changes: Fields | None = None
) -> Path:
    """Write a random float32 checkpoint of `family` to `target`, with the first words of `tokenizer_dir`'s tokenizer.

    Norm weights and biases are random too: left at ones and zeros they would hide a stream that skips a norm or
    drops a bias.

    Args:
        family: an architecture or a short name of one.
        tokenizer_dir: None leaves the checkpoint without a tokenizer, for machines that have no other model either.
        changes: as `tiny_config` takes them.

    Returns:
        `target`.

    Raises:
        KeyError: the family is not in the tables.
    """
    config = tiny_config(family, changes)
    architectures = config.architectures
    row = ARCHITECTURES.get(family)
    model_class = hf_class((row and row.hf_class) or architectures[0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).float()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith(_NOT_RANDOM):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config.dtype = "float32"
    model.save_pretrained(target)
    if model_class.__name__ != architectures[0]:  # it wrote its own name
        _edit_json(target / "config.json", architectures=architectures)
    if family in _TRANSPOSED_EXPERTS:
        _transpose_experts(target / "model.safetensors")
    if tokenizer_dir is None:
        return target
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_dir / name).exists():
            shutil.copy(tokenizer_dir / name, target / name)
    (target / "tokenizer.json").write_text(_first_words(tokenizer_dir / "tokenizer.json"), encoding="utf-8")
    return target


def _edit_json(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | fields, indent=2), encoding="utf-8")


def _transpose_experts(file: Path) -> None:
    """Swap the last two dimensions of the stacked experts in a checkpoint."""
    weights = load_file(file)
    stacked = {name: one.mT.contiguous() for name, one in weights.items() if "experts" in name and one.ndim == 3}
    save_file(weights | stacked, file, metadata={"format": "pt"})


def _first_words(tokenizer: Path) -> str:
    """A byte-pair `tokenizer` as it was after learning `VOCAB_SIZE` words, which can still encode every text."""
    whole = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = whole["model"]
    model["vocab"] = {word: token for word, token in model["vocab"].items() if token < VOCAB_SIZE}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return json.dumps(whole)
