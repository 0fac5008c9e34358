"""The model families that can be steered, and how their decoder layers return the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vllm_steer.device.buffers import HookPoint, SteerBuffers
from vllm_steer.errors import LayerNotHooked, UnsupportedModel

Convention = Literal["fused", "single", "first", "batched"]
"""The return value of a decoder layer (T tokens, D hidden size):

``fused``: (h, r), both (T, D); the stream is h + r, and the next layer's norm adds them up.
``single``: the stream itself, (T, D).
``first``: (h, x); the stream is h, and the next layer does not read x.
``batched``: the stream itself, (1, T, D), as in Hugging Face's modules.
"""


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the family table.

    Attributes:
        architecture: name in the checkpoint's config, as vLLM resolves it.
        layer_class: class of the decoder layer in vLLM 0.32, with its module.
        convention: how that class returns the stream.
        scales_float16: whether the class divides a float16 stream by a constant of the model to keep it in range.
    """

    architecture: str
    layer_class: str
    convention: Convention
    scales_float16: bool = False

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a dtype in which the layers return a rescaled residual stream.

        Raises:
            UnsupportedModel: the layers rescale a stream of this dtype.
        """
        if self.scales_float16 and dtype == torch.float16:
            raise UnsupportedModel(
                f"{self.architecture} runs in float16 on a rescaled residual stream, in which α and readouts would "
                "mean something else; allowed: bfloat16 and float32. Start with dtype='bfloat16'."
            )


_VLLM = "vllm.model_executor.models"
_HUGGING_FACE = "transformers.models"
_ON_ANOTHER_STAGE = f"{_VLLM}.utils.PPMissingLayer"

# A family is listed once its steering and readout were compared with Hugging Face by tests/engine/exact/test_parity.py.
FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", f"{_VLLM}.llama.LlamaDecoderLayer", "fused"),
        Family("MistralForCausalLM", f"{_VLLM}.mistral.MistralDecoderLayer", "fused"),
        Family("Qwen2ForCausalLM", f"{_VLLM}.qwen2.Qwen2DecoderLayer", "fused"),
        Family("Qwen3ForCausalLM", f"{_VLLM}.qwen3.Qwen3DecoderLayer", "fused"),
        Family("Phi3ForCausalLM", f"{_VLLM}.llama.LlamaDecoderLayer", "fused"),
        Family("Gemma2ForCausalLM", f"{_VLLM}.gemma2.Gemma2DecoderLayer", "fused"),
        Family("Gemma3ForCausalLM", f"{_VLLM}.gemma3.Gemma3DecoderLayer", "fused"),
        Family("MixtralForCausalLM", f"{_VLLM}.mixtral.MixtralDecoderLayer", "fused"),
        Family("Qwen2MoeForCausalLM", f"{_VLLM}.qwen2_moe.Qwen2MoeDecoderLayer", "fused"),
        Family("Qwen3MoeForCausalLM", f"{_VLLM}.qwen3_moe.Qwen3MoeDecoderLayer", "fused"),
        Family("GptOssForCausalLM", f"{_VLLM}.gpt_oss.TransformerBlock", "fused"),
        Family("DeepseekV2ForCausalLM", f"{_VLLM}.deepseek_v2.DeepseekV2DecoderLayer", "fused", scales_float16=True),
        Family("GPT2LMHeadModel", f"{_VLLM}.gpt2.GPT2Block", "single"),
        Family("OPTForCausalLM", f"{_VLLM}.opt.OPTDecoderLayer", "single"),
        Family("GraniteForCausalLM", f"{_VLLM}.granite.GraniteDecoderLayer", "single"),
        Family("CohereForCausalLM", f"{_VLLM}.commandr.CohereDecoderLayer", "first"),
        Family("StableLmForCausalLM", f"{_VLLM}.stablelm.StablelmDecoderLayer", "first"),
        Family("Olmo2ForCausalLM", f"{_HUGGING_FACE}.olmo2.modeling_olmo2.Olmo2DecoderLayer", "batched"),
        Family("GPTNeoXForCausalLM", f"{_HUGGING_FACE}.gpt_neox.modeling_gpt_neox.GPTNeoXLayer", "batched"),
        Family("PhiForCausalLM", f"{_HUGGING_FACE}.phi.modeling_phi.PhiDecoderLayer", "batched"),
    )
}

_MANY_STREAMS = "its decoder layers mix several residual streams, and none of them is the one to steer or read"
_UNFINISHED = "its decoder layers leave the last addition to the next layer, so no layer returns the complete stream"
# Architectures that were examined (vLLM 0.32) and cannot be exact. Nothing is known about the others.
_REASONS = {
    "DeepseekV4ForCausalLM": _MANY_STREAMS,
    "Glm5NextForCausalLM": _MANY_STREAMS,
    "HYV4ForCausalLM": _MANY_STREAMS,
    "InklingForCausalLM": _UNFINISHED,
    "Qwen4ExpForCausalLM": _UNFINISHED,
}
_MULTIMODAL = "ForConditionalGeneration"
# Prefix of vLLM's classes that run Hugging Face's modules: TransformersForCausalLM, TransformersMoEForCausalLM.
_BY_HUGGING_FACE = "Transformers"


def _reason(architecture: str) -> str:
    if architecture in _REASONS:
        return _REASONS[architecture]
    if architecture.endswith(_MULTIMODAL):
        return "it is a multimodal model, and positions of images or sound have not been compared with Hugging Face"
    return "its decoder layers have not been compared with Hugging Face"


def _reason_of_backend(model_impl: str) -> str:
    if model_impl == "transformers":
        return (
            "model_impl='transformers' was given, so vLLM runs the model through Hugging Face's modules; steering was "
            "compared there only for architectures that vLLM runs that way by itself"
        )
    return (
        "vLLM has no class of its own for it and runs it through Hugging Face's modules, where its decoder layers have "
        "not been compared"
    )


def family_of(architecture: str, *, model_impl: str = "auto", checkpoint: str | None = None) -> Family:
    """The family of an architecture.

    Args:
        architecture: as vLLM resolves it.
        model_impl: the engine argument of this name; it explains why vLLM runs a model through Hugging Face's modules.
        checkpoint: the architecture in the checkpoint's config; None if it is not known.

    Raises:
        UnsupportedModel: it is not in the table; the message says why and lists the table.
    """
    if architecture not in FAMILIES:
        named, reason = architecture, _reason(architecture)
        if architecture.startswith(_BY_HUGGING_FACE):
            reason = _reason_of_backend(model_impl)
            if checkpoint is not None and checkpoint != architecture:
                named = f"{checkpoint}, run as {architecture}"
        raise UnsupportedModel(
            f"the model's architecture is {named}: {reason}. Steering is exact for: {', '.join(sorted(FAMILIES))}. Use "
            "one of these, or start the engine without steer_config."
        )
    return FAMILIES[architecture]


def attach(model: nn.Module, family: Family, layers: tuple[int, ...], buffers: SteerBuffers) -> None:
    """Put a hook point on each of ``layers`` of a loaded model, before it is compiled.

    Skips layers on other pipeline stages.

    Args:
        model: the loaded model.
        family: its row of the family table.
        layers: layer numbers; a layer's place in this tuple is its layer index.
        buffers: provides the hook points.

    Raises:
        UnsupportedModel: the layers' class is not the one in the family table (another implementation was loaded).
        LayerNotHooked: the model has no such layer.
    """
    blocks = decoder_blocks(model)
    for index, layer in enumerate(layers):
        if layer >= len(blocks):
            raise LayerNotHooked(f"layer {layer} was requested; the model has layers 0 to {len(blocks) - 1}.")
        block = blocks[layer]
        if class_name(block) == _ON_ANOTHER_STAGE:
            continue
        if class_name(block) != family.layer_class:
            raise UnsupportedModel(
                f"layer {layer} of this {family.architecture} is a {class_name(block)}; allowed: "
                f"{family.layer_class}. Load the model as vLLM does by itself (model_impl='auto')."
            )
        block.add_module("vllm_steer", buffers.layer(index))
        block.register_forward_hook(_HOOKS[family.convention])


def hooked_layers(model: nn.Module) -> list[int]:
    """The numbers of the layers of a loaded model that have a hook point."""
    return [
        index
        for index, block in enumerate(decoder_blocks(model))
        if isinstance(getattr(block, "vllm_steer", None), HookPoint)
    ]


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers: in all families of the table, the first ModuleList in ``model.modules()``.

    The longest ModuleList would be wrong: a layer may hold more experts than the model has layers.

    Raises:
        UnsupportedModel: the model has no ModuleList.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers; steering needs one.")


def class_name(module: nn.Module) -> str:
    """The class of a module with its Python module, because Hugging Face and vLLM use the same class names."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


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
