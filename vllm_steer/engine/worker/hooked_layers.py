"""Puts hook points on the decoder layers of a loaded model, each by how its class returns the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.engine.layer_classes import LAYER_CLASSES, Convention
from vllm_steer.engine.worker.layer_experiment import Findings, Layer
from vllm_steer.errors import LayerNotHooked, UnsupportedModel
from vllm_steer.schema.readout import Proof


def conventions(findings: Findings, *, allow_unproven: bool) -> tuple[dict[int, Convention], Proof]:
    """How each decoder layer returns the stream: what the table and the experiment both say.

    Args:
        findings: the experiment's, of the loaded model.
        allow_unproven: whether the experiment alone is enough for a class that is not in the table.

    Returns:
        layer number -> convention; and why it is taken to be right.

    Raises:
        UnsupportedModel: the table and the experiment differ, or a class is not in the table and must be.
    """
    found: dict[int, Convention] = {}
    proof: Proof = "parity"
    for layer in findings.layers:
        row = LAYER_CLASSES.get(layer.path)
        if row is None:
            if not allow_unproven:
                raise UnsupportedModel(
                    f"layer {layer.number} is a {layer.path}, whose steering and readout were never compared with "
                    f"Hugging Face; the experiment at start-up finds that it returns the stream as "
                    f"{layer.convention!r}. Allowed: the classes in docs/conformance.md, and any other with "
                    "steer_config(unproven_model='experiment'), which takes the experiment's word. Set it, or use "
                    "another model."
                )
            proof = "experiment"
        elif layer.convention not in (None, row.convention):
            raise UnsupportedModel(
                f"layer {layer.number}, a {layer.path}, returns the stream as {layer.convention!r} in the experiment "
                f"at start-up and as {row.convention!r} in the table of compared classes; allowed: the same in both. "
                "The loaded model is not the one that was compared: use vLLM's own, or start the engine without "
                "steer_config."
            )
        found[layer.number] = row.convention if row is not None else _answered(layer)
    return found, proof


def _answered(layer: Layer) -> Convention:
    if layer.convention is None:
        raise UnsupportedModel(
            f"layer {layer.number}, a {layer.path}, returns two tensors to another pipeline stage, and no other layer "
            "of its class on this stage says how; allowed: stages with two layers of each class. Start with a smaller "
            "pipeline_parallel_size, or without steer_config."
        )
    return layer.convention


def put_hooks(
    blocks: Mapping[int, nn.Module],
    how: Mapping[int, Convention],
    layers: Sequence[int],
    num_layers: int,
    buffers: SteerBuffers,
) -> list[int]:
    """Put a hook point on each of ``layers`` that is on this pipeline stage, before the model is compiled.

    Args:
        blocks: layer number -> decoder layer, of this stage.
        how: layer number -> how it returns the stream.
        layers: layer numbers; a layer's place in this sequence is its layer index.
        num_layers: layers of the whole model.
        buffers: provides the hook points.

    Returns:
        The numbers of the layers that have a hook point now.

    Raises:
        LayerNotHooked: the model has no such layer.
    """
    held = []
    for index, layer in enumerate(layers):
        if layer >= num_layers:
            raise LayerNotHooked(f"layer {layer} was requested; the model has layers 0 to {num_layers - 1}.")
        if layer in blocks:
            blocks[layer].add_module("vllm_steer", buffers.layer(index))
            blocks[layer].register_forward_hook(_HOOKS[how[layer]])
            held.append(layer)
    return held


def _point(block: Any) -> Any:
    return block.vllm_steer  # an attribute, not a closure, so that the compiler takes its tensors as graph inputs


def _after_fused(block: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _point(block)(output[0], output[1])


def _after_single(block: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    _point(block)(output, None)


def _after_first(block: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> None:
    _point(block)(output[0], None)


def _after_batched(block: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    _point(block)(output[0], None)  # a view: the op's changes in it reach the output


_HOOKS: dict[Convention, Callable[..., None]] = {
    "fused": _after_fused,
    "single": _after_single,
    "first": _after_first,
    "batched": _after_batched,
}
