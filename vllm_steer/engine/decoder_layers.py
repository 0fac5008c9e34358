"""Which models can be steered, and how their decoder layers hand on the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vllm_steer.buffers import HookPoint, SteerBuffers
from vllm_steer.errors import LayerNotHooked, UnsupportedModel

Convention = Literal["fused", "single"]
"""``fused``: the layer returns (h, r) and the stream is h + r. ``single``: it returns the stream itself."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the family table.

    Attributes:
        architecture: name in the checkpoint's config, as vLLM resolves it.
        layer_class: class of the decoder layer in vLLM 0.32.
        convention: how that class returns the stream.
    """

    architecture: str
    layer_class: str
    convention: Convention


# A family is listed once its steering and readout were compared with Hugging Face by tests/engine/test_parity.py.
FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "LlamaDecoderLayer", "fused"),
        Family("Qwen2ForCausalLM", "Qwen2DecoderLayer", "fused"),
        Family("Phi3ForCausalLM", "LlamaDecoderLayer", "fused"),
        Family("GPT2LMHeadModel", "GPT2Block", "single"),
    )
}


def family_of(architecture: str) -> Family:
    """The family of an architecture.

    Raises:
        UnsupportedModel: it is not in the table; the message lists what is.
    """
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"the model's architecture is {architecture}; steering is exact for: {', '.join(sorted(FAMILIES))}. Use "
            "one of these, or start the engine without steer_config."
        )
    return FAMILIES[architecture]


def attach(model: nn.Module, family: Family, layers: tuple[int, ...], buffers: SteerBuffers) -> None:
    """Put a hook point on each of ``layers`` of a loaded model, before it is compiled.

    Raises:
        UnsupportedModel: the layers are not what the family table says (another model implementation was loaded).
        LayerNotHooked: a layer that this model does not have.
    """
    blocks = decoder_blocks(model)
    for index, layer in enumerate(layers):
        if layer >= len(blocks):
            raise LayerNotHooked(f"layer {layer} was asked; the model has layers 0 to {len(blocks) - 1}.")
        block = blocks[layer]
        if type(block).__name__ != family.layer_class:
            raise UnsupportedModel(
                f"layer {layer} of this {family.architecture} is a {type(block).__name__}; allowed: "
                f"{family.layer_class}. Load the model with vLLM's own implementation (model_impl='vllm')."
            )
        block.add_module("vllm_steer", buffers.layer(index))
        block.register_forward_hook(_HOOKS[family.convention])


def hooked_layers(model: nn.Module) -> list[int]:
    """The layers of a loaded model that carry a hook point."""
    return [
        index
        for index, block in enumerate(decoder_blocks(model))
        if isinstance(getattr(block, "vllm_steer", None), HookPoint)
    ]


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers: the longest ModuleList, which in all families of the table is the stack of blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers; steering needs one.")
    return max(lists, key=len)


def _point(block: Any) -> Any:
    return block.vllm_steer  # by name, not in a closure: the compiler then takes the point's tensors as graph inputs


def _after_fused(block: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _point(block)(output[0], output[1])


def _after_single(block: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    _point(block)(output, None)


_HOOKS: dict[Convention, Callable[..., None]] = {"fused": _after_fused, "single": _after_single}
