"""The classes of decoder layers that can be steered, how each returns the residual stream, and what is refused.

A model's class of decoder layer decides how it is steered, not its architecture: wrappers for images and sound use the
classes of their text model, and hybrids use several. Start-up refuses an architecture by name where that alone is
enough, and asks the loaded model for everything else (``worker/layer_experiment.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_steer.errors import UnsupportedModel

if TYPE_CHECKING:  # tests of clients read the table where no torch is
    import torch

Convention = Literal["fused", "single", "first", "batched"]
"""The return value of a decoder layer (T tokens, D hidden size):

``fused``: (h, r), both (T, D); the stream is h + r, and the next layer's norm adds them up.
``single``: the stream itself, (T, D).
``first``: (h, x); the stream is h, and the next layer does not read x.
``batched``: the stream itself, (1, T, D), as in Hugging Face's modules.
"""


@dataclass(frozen=True, slots=True)
class LayerClass:
    """One row of the table.

    Attributes:
        path: the class with its Python module, because Hugging Face and vLLM use the same class names.
        convention: how it returns the stream.
        architectures: the architectures, as checkpoints name them, whose steering and readout on this class were
            compared with Hugging Face by tests/engine/exact/test_parity.py.
        scales_float16: whether the class divides a float16 stream by a constant of the model to keep it in range.
    """

    path: str
    convention: Convention
    architectures: tuple[str, ...]
    scales_float16: bool = False


def _of_vllm(path: str, convention: Convention, architectures: str, scales_float16: bool = False) -> LayerClass:
    return LayerClass(f"vllm.model_executor.models.{path}", convention, tuple(architectures.split()), scales_float16)


def _of_hugging_face(path: str, architecture: str) -> LayerClass:
    """A class of Hugging Face that vLLM runs because it has none of its own."""
    module, name = path.split(".")
    return LayerClass(f"transformers.models.{module}.modeling_{module}.{name}", "batched", (architecture,))


# fmt: off
_ROWS = (
    _of_vllm("AXK1.AXK1DecoderLayer", "fused", "AXK1ForCausalLM"),
    _of_vllm("afmoe.AfmoeDecoderLayer", "fused", "AfmoeForCausalLM"),
    _of_vllm("aria.AriaTextDecoderLayer", "fused", "AriaForConditionalGeneration"),
    _of_vllm("deepseek_v2.DeepseekV2DecoderLayer", "fused", "DeepseekV2ForCausalLM DeepseekV3ForCausalLM",
             scales_float16=True),
    _of_vllm("ernie45_moe.Ernie4_5_MoeDecoderLayer", "fused", "Ernie4_5_MoeForCausalLM"),
    _of_vllm("exaone_moe.ExaoneMoeDecoderLayer", "fused", "ExaoneMoeForCausalLM"),
    _of_vllm("gemma.GemmaDecoderLayer", "fused", "GemmaForCausalLM PaliGemmaForConditionalGeneration"),
    _of_vllm("gemma2.Gemma2DecoderLayer", "fused", "Gemma2ForCausalLM"),
    _of_vllm("gemma3.Gemma3DecoderLayer", "fused", "Gemma3ForCausalLM Gemma3ForConditionalGeneration"),
    _of_vllm("glm4.Glm4DecoderLayer", "fused",
             "Glm4ForCausalLM Glm4vForConditionalGeneration GlmOcrForConditionalGeneration"),
    _of_vllm("glm4_moe.Glm4MoeDecoderLayer", "fused", "Glm4MoeForCausalLM Glm4vMoeForConditionalGeneration"),
    _of_vllm("glm4_moe_lite.Glm4MoeLiteDecoderLayer", "fused", "Glm4MoeLiteForCausalLM"),
    _of_vllm("gpt_oss.TransformerBlock", "fused", "GptOssForCausalLM"),
    _of_vllm("hy_v3.HYV3DecoderLayer", "fused", "HYV3ForCausalLM"),
    _of_vllm("lfm2.Lfm2AttentionDecoderLayer", "fused", "Lfm2ForCausalLM Lfm2VlForConditionalGeneration"),
    _of_vllm("lfm2.Lfm2ShortConvDecoderLayer", "fused", "Lfm2ForCausalLM Lfm2VlForConditionalGeneration"),
    _of_vllm("lfm2_moe.Lfm2MoeAttentionDecoderLayer", "fused", "Lfm2MoeForCausalLM"),
    _of_vllm("lfm2_moe.Lfm2MoeShortConvDecoderLayer", "fused", "Lfm2MoeForCausalLM"),
    _of_vllm("llama.LlamaDecoderLayer", "fused",
             "LlamaForCausalLM Phi3ForCausalLM Ernie4_5ForCausalLM InternLM3ForCausalLM IQuestCoderForCausalLM "
             "TeleChat3ForCausalLM SmolVLMForConditionalGeneration Idefics3ForConditionalGeneration "
             "LlavaForConditionalGeneration LlavaNextForConditionalGeneration PaddleOCRVLForConditionalGeneration"),
    _of_vllm("llama4.Llama4DecoderLayer", "fused", "Llama4ForCausalLM Llama4ForConditionalGeneration"),
    _of_vllm("mamba2.Mamba2DecoderLayer", "fused", "Mamba2ForCausalLM"),
    _of_vllm("mimo_v2.MiMoV2FlashDecoderLayer", "fused", "MiMoV2FlashForCausalLM"),
    _of_vllm("minimax_m2.MiniMaxM2DecoderLayer", "fused", "MiniMaxM2ForCausalLM"),
    _of_vllm("mistral.MistralDecoderLayer", "fused",
             "MistralForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration"),
    _of_vllm("mixtral.MixtralDecoderLayer", "fused", "MixtralForCausalLM"),
    _of_vllm("nemotron.NemotronDecoderLayer", "fused", "NemotronForCausalLM"),
    _of_vllm("nemotron_h.NemotronHAttentionDecoderLayer", "fused", "NemotronHForCausalLM"),
    _of_vllm("nemotron_h.NemotronHMLPDecoderLayer", "fused", "NemotronHForCausalLM"),
    _of_vllm("nemotron_h.NemotronHMambaDecoderLayer", "fused", "NemotronHForCausalLM"),
    _of_vllm("olmoe.OlmoeDecoderLayer", "fused", "OlmoeForCausalLM"),
    _of_vllm("qwen2.Qwen2DecoderLayer", "fused",
             "Qwen2ForCausalLM Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration "
             "InternVLForConditionalGeneration LlavaOnevisionForConditionalGeneration"),
    _of_vllm("qwen2_moe.Qwen2MoeDecoderLayer", "fused", "Qwen2MoeForCausalLM"),
    _of_vllm("qwen3.Qwen3DecoderLayer", "fused", "Qwen3ForCausalLM Qwen3ASRForConditionalGeneration"),
    _of_vllm("qwen3_5.Qwen3_5DecoderLayer", "fused",
             "Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen3_5ForConditionalGeneration "
             "Qwen3_5MoeForConditionalGeneration MiniCPMV4_6ForConditionalGeneration"),
    _of_vllm("qwen3_moe.Qwen3MoeDecoderLayer", "fused", "Qwen3MoeForCausalLM"),
    _of_vllm("qwen3_next.Qwen3NextDecoderLayer", "fused", "Qwen3NextForCausalLM"),
    _of_vllm("qwen3_vl.Qwen3VLDecoderLayer", "fused", "Qwen3VLForConditionalGeneration"),
    _of_vllm("qwen3_vl_moe.Qwen3VLMoeDecoderLayer", "fused", "Qwen3VLMoeForConditionalGeneration"),

    _of_vllm("cohere2_moe.Cohere2MoeDecoderLayer", "first", "Cohere2MoeForCausalLM"),
    _of_vllm("commandr.CohereDecoderLayer", "first",
             "CohereForCausalLM Cohere2ForCausalLM Cohere2VisionForConditionalGeneration"),
    _of_vllm("exaone4.Exaone4DecoderLayer", "first", "Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration"),
    _of_vllm("gemma4.Gemma4DecoderLayer", "first",
             "Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration"),
    _of_vllm("granitemoehybrid.GraniteMoeHybridAttentionDecoderLayer", "first", "GraniteMoeHybridForCausalLM"),
    _of_vllm("granitemoehybrid.GraniteMoeHybridMambaDecoderLayer", "first", "GraniteMoeHybridForCausalLM"),
    _of_vllm("hyperclovax.HyperCLOVAXDecoderLayer", "first", "HyperCLOVAXForCausalLM"),
    _of_vllm("minicpm3.MiniCPM3DecoderLayer", "first", "MiniCPM3ForCausalLM"),
    _of_vllm("stablelm.StablelmDecoderLayer", "first", "StableLmForCausalLM"),

    _of_vllm("falcon.FalconDecoderLayer", "single", "FalconForCausalLM"),
    _of_vllm("falcon_h1.FalconH1ParallelHybrid", "single", "FalconH1ForCausalLM"),
    _of_vllm("gpt2.GPT2Block", "single", "GPT2LMHeadModel"),
    _of_vllm("gpt_j.GPTJBlock", "single", "GPTJForCausalLM"),
    _of_vllm("granite.GraniteDecoderLayer", "single", "GraniteForCausalLM GraniteSWAForCausalLM"),
    _of_vllm("granitemoe.GraniteMoeDecoderLayer", "single", "GraniteMoeForCausalLM"),
    _of_vllm("granitemoeshared.GraniteMoeSharedDecoderLayer", "single",
             "GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM"),
    _of_vllm("opt.OPTDecoderLayer", "single", "OPTForCausalLM"),
    _of_vllm("zamba2.Zamba2HybridLayer", "single", "Zamba2ForCausalLM"),
    _of_vllm("zamba2.Zamba2MambaDecoderLayer", "single", "Zamba2ForCausalLM"),

    _of_hugging_face("arcee.ArceeDecoderLayer", "ArceeForCausalLM"),
    _of_hugging_face("cwm.CwmDecoderLayer", "CwmForCausalLM"),
    _of_hugging_face("flex_olmo.FlexOlmoDecoderLayer", "FlexOlmoForCausalLM"),
    _of_hugging_face("glm.GlmDecoderLayer", "GlmForCausalLM"),
    _of_hugging_face("gpt_bigcode.GPTBigCodeBlock", "GPTBigCodeForCausalLM"),
    _of_hugging_face("gpt_neox.GPTNeoXLayer", "GPTNeoXForCausalLM"),
    _of_hugging_face("hunyuan_v1_dense.HunYuanDenseV1DecoderLayer", "HunYuanDenseV1ForCausalLM"),
    _of_hugging_face("hunyuan_v1_moe.HunYuanMoEV1DecoderLayer", "HunYuanMoEV1ForCausalLM"),
    _of_hugging_face("jais2.Jais2DecoderLayer", "Jais2ForCausalLM"),
    _of_hugging_face("mellum.MellumDecoderLayer", "MellumForCausalLM"),
    _of_hugging_face("olmo.OlmoDecoderLayer", "OlmoForCausalLM"),
    _of_hugging_face("olmo2.Olmo2DecoderLayer", "Olmo2ForCausalLM"),
    _of_hugging_face("olmo3.Olmo3DecoderLayer", "Olmo3ForCausalLM"),
    _of_hugging_face("phi.PhiDecoderLayer", "PhiForCausalLM"),
    _of_hugging_face("seed_oss.SeedOssDecoderLayer", "SeedOssForCausalLM"),
    _of_hugging_face("smollm3.SmolLM3DecoderLayer", "SmolLM3ForCausalLM"),
    _of_hugging_face("starcoder2.Starcoder2DecoderLayer", "Starcoder2ForCausalLM"),
    _of_hugging_face("vaultgemma.VaultGemmaDecoderLayer", "VaultGemmaForCausalLM"),
)
# fmt: on

LAYER_CLASSES = {row.path: row for row in _ROWS}

_MANY_STREAMS = "its decoder layers mix several residual streams, and none of them is the one to steer or read"
_UNFINISHED = "its decoder layers leave the last addition to the next layer, so no layer returns the complete stream"
_RUN_TWICE = "its decoder layers run more than once per token, so a layer has several outputs, not one"
_NO_TEXT = "it does not generate text token by token from a decoder alone"


def _refused(reason: str, architectures: str) -> dict[str, str]:
    return dict.fromkeys(architectures.split(), reason)


# Architectures of vLLM 0.32 that were examined and cannot be exact.
REFUSED_ARCHITECTURES = {
    **_refused(
        _MANY_STREAMS,
        "DeepseekV4ForCausalLM DeepseekV4ForConditionalGeneration DeepseekV41ForCausalLM Gemma3nForCausalLM "
        "Gemma3nForConditionalGeneration Glm5NextForCausalLM Glm5NextForConditionalGeneration HYV4ForCausalLM",
    ),
    **_refused(
        _UNFINISHED,
        "InklingForCausalLM InklingForConditionalGeneration KimiK3ForConditionalGeneration KimiLinearForCausalLM "
        "Qwen4ExpForCausalLM Qwen4ExpForConditionalGeneration",
    ),
    **_refused(_RUN_TWICE, "HrmTextForCausalLM IQuestLoopCoderForCausalLM"),
    **_refused(
        _NO_TEXT,
        "CohereAsrForConditionalGeneration DiffusionGemmaForBlockDiffusion FireRedASR2ForConditionalGeneration "
        "FunASRForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration "
        "NemotronParseForConditionalGeneration OpenVLAForActionPrediction WhisperForConditionalGeneration",
    ),
}
# vLLM 0.32 on GPUs: the all-reduce after the MLP happens in the next layer's norm (vllm/models/{deepseek_v32,
# dots3_note,minimax_m3}), so with tensor parallelism each rank's h is a part of a sum.
_PARTIAL_SUMS = frozenset(
    (
        "DeepseekV32ForCausalLM",
        "Dots3NoteForCausalLM",
        "GlmMoeDsaForCausalLM",
        "MiniMaxM3SparseForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
    )
)


def refuse_architecture(architecture: str, tensor_parallel_size: int) -> None:
    """Refuse a model that is known not to be exact, by the name of its architecture in the checkpoint's config.

    Raises:
        UnsupportedModel: it was examined and cannot be exact, or not with this tensor parallelism.
    """
    if architecture in REFUSED_ARCHITECTURES:
        raise UnsupportedModel(
            f"the model's architecture is {architecture}: {REFUSED_ARCHITECTURES[architecture]}. Allowed: any "
            "architecture whose decoder layers each return one residual stream; docs/conformance.md lists those that "
            "were compared. Use another model, or start the engine without steer_config."
        )
    if architecture in _PARTIAL_SUMS and tensor_parallel_size > 1:
        raise UnsupportedModel(
            f"the model's architecture is {architecture} with tensor_parallel_size={tensor_parallel_size}: its decoder "
            "layers leave the sum over the ranks to the next layer, so no rank holds the stream; allowed: "
            "tensor_parallel_size=1. Set it to 1, or start the engine without steer_config."
        )


def classes_compared_for(architecture: str) -> tuple[LayerClass, ...]:
    """The rows in which an architecture was compared with Hugging Face; empty if it never was."""
    return tuple(row for row in _ROWS if architecture in row.architectures)


def refuse_rescaled(paths: frozenset[str], dtype: torch.dtype) -> None:
    """Refuse a dtype in which one of these classes of decoder layers returns a rescaled stream.

    Raises:
        UnsupportedModel: it would.
    """
    for path in sorted(paths):
        row = LAYER_CLASSES.get(path)
        if row is not None and row.scales_float16 and str(dtype) == "torch.float16":
            raise UnsupportedModel(
                f"{path} runs in float16 on a rescaled residual stream, in which α and readouts would mean something "
                "else; allowed: bfloat16 and float32. Start with dtype='bfloat16'."
            )
