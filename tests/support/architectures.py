"""Every architecture on which steering is compared with Hugging Face: its tiny config and how vLLM serves it here.

`ARCHITECTURES` has them all, by the name in a checkpoint's config; `REPRESENTATIVE` are few that differ the most.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.support.tiny_configs import (
    ALTERNATING,
    FAMILIES,
    HEAD_SIZE,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_HEADS,
    NUM_KV_HEADS,
    TIED,
    Fields,
)


@dataclass(frozen=True)
class Architecture:
    """How a tiny model of one architecture is made and served.

    Attributes:
        layer_classes: the classes of its decoder layers in vLLM, all of which the model has.
        name: in a checkpoint's config; None where it is the key in the table.
        fields: of its config, over the small values that go by name; those of a nested config under its name.
        whole: `fields` are all there are, none goes by name.
        hf_class: transformers' class, where it has another name.
        engine: arguments of `vllm.LLM`.
        environment: variables set while the engine lives.
        stand_ins: names from `tests.support.cpu_stand_ins`.
    """

    layer_classes: tuple[str, ...]
    fields: Fields = field(default_factory=dict)
    whole: bool = False
    hf_class: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    name: str | None = None


# Many of the fields below stand in every released config.json and vLLM reads them, but the config class of transformers
# does not know them and so does not write them.
_ROPE: Fields = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE: Fields = {"rope_parameters": _ROPE | {"mrope_section": [4, 6, 6]}}  # together half of the rotated part
_HALF_MROPE: Fields = {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}
_GEMMA4: Fields = TIED | ALTERNATING | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_GEMMA4_DENSE: Fields = _GEMMA4 | {"enable_moe_block": False, "num_experts": None, "top_k_experts": None}
# By their shape only can transformers tell whether experts are stored transposed: none may be square.
_QWEN3_VL_MOE: Fields = {"norm_topk_prob": True, "moe_intermediate_size": 96}
_GEMMA4_EXPERTS: Fields = _GEMMA4 | {"enable_moe_block": True, "num_experts": NUM_EXPERTS, "top_k_experts": 2}
# Inputs of their own for each layer, and the last two layers take keys and values from the first two.
_GEMMA4_E: Fields = _GEMMA4_DENSE | {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
# The MLP squares its values: with wider weights the stream would be too long for a direction to matter.
_SQUARES: Fields = {"initializer_range": 0.1}
_SIGMOID: Fields = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_GRANITE: Fields = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "logits_scaling": 0.8,
}
_LFM2: Fields = {
    "layer_types": ["conv", "full_attention"] * 2,
    "conv_dim": HIDDEN_SIZE,
    "block_dim": HIDDEN_SIZE,
    "block_ff_dim": 2 * HIDDEN_SIZE,
    "block_auto_adjust_ff_dim": False,
    # One head: as in DeepSeek V2.
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
# Longer than the prompts: vLLM's windows of these are one token wider than transformers'.
_COHERE2: Fields = {"logit_scale": 1.5, "sliding_window": 256}
_LLAMA4: Fields = {"num_experts_per_tok": 1, "attention_chunk_size": 64}
_CLIP: Fields = {"vision_config": {"patch_size": 14, "num_hidden_layers": 3}}
_MIMO: Fields = (
    ALTERNATING
    | _SIGMOID
    | {
        "rope_parameters": {kind: _ROPE | {"partial_rotary_factor": 0.5} for kind in ALTERNATING["layer_types"]},
        "rope_theta": 10000.0,
        "swa_rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "moe_layer_freq": [0, 1, 1, 1],
        "layernorm_epsilon": 1e-5,
        "rms_norm_eps": 1e-5,
        "sliding_window_size": 32,
        "add_swa_attention_sink_bias": True,
        "swa_num_attention_heads": NUM_HEADS,
        "swa_num_key_value_heads": 2 * NUM_KV_HEADS,
        "swa_head_dim": HEAD_SIZE,
        "swa_v_head_dim": HEAD_SIZE,
        "n_shared_experts": None,
    }
)
_MINIMAX: Fields = {
    "rotary_dim": HEAD_SIZE // 2,
    "rope_parameters": _ROPE | {"partial_rotary_factor": 0.5},
    "use_qk_norm": True,
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
}
_NEMOTRON_H: Fields = {
    "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
    "hybrid_override_pattern": "M-*-",
    "num_hidden_layers": 4,
    "sliding_window": None,  # transformers honours it, vLLM does not, and no released model has one
    "time_step_min": 1e-9,  # transformers clamps the time step there, vLLM does not
}
_ZAMBA2: Fields = {
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "layer_types": ["mamba", "hybrid"] * 2,
    "hybrid_layer_ids": [1, 3],
    "num_key_value_heads": NUM_HEADS,
    "attention_hidden_size": 2 * HIDDEN_SIZE,
    "attention_head_dim": 2 * HEAD_SIZE,
    "time_step_min": 1e-9,
}


# vLLM's CPU kernel for Mamba 2 keeps no states in the middle of a prompt, which prefix caching asks of some models.
_NO_PREFIXES = {"enable_prefix_caching": False}
# Of vLLM's two CPU kernels for latent attention, one is inexact in float32 and one refuses float32.
_NO_MLA = {"VLLM_MLA_DISABLE": "1"}


def _vllm(names: str) -> tuple[str, ...]:
    """Classes of vLLM's models, "module.Class" each."""
    return tuple(f"vllm.model_executor.models.{name}" for name in names.split())


def _hugging_face(module: str, name: str) -> tuple[str, ...]:
    """A class of transformers, which vLLM runs as it is."""
    return (f"transformers.models.{module}.modeling_{module}.{name}",)


def _of_family(short_name: str, classes: tuple[str, ...], **served: Any) -> tuple[str, Architecture]:
    """One of the twenty families, whose config is written out."""
    name, fields = FAMILIES[short_name]
    return name, Architecture(classes, fields, whole=True, **served)


def _text(name: str, classes: tuple[str, ...], fields: Fields | None = None, **served: Any) -> tuple[str, Architecture]:
    return f"{name}ForCausalLM", Architecture(classes, fields or {}, **served)


def _wrapper(
    name: str, classes: tuple[str, ...], text: Fields | None = None, fields: Fields | None = None, **served: Any
) -> tuple[str, Architecture]:
    """A multimodal model, of which only the part for text is served; `text` are fields of that part's config."""
    nested = {"text_config": text or {}} | (fields or {})
    engine = {"language_model_only": True}
    return f"{name}ForConditionalGeneration", Architecture(classes, nested, engine=engine, **served)


def _variant(name: str, what: str, classes: tuple[str, ...], fields: Fields, **served: Any) -> tuple[str, Architecture]:
    """Another form of an architecture that is in the table already."""
    return f"{name}, {what}", Architecture(classes, fields, name=name, **served)


_LLAMA = _vllm("llama.LlamaDecoderLayer")
_QWEN2 = _vllm("qwen2.Qwen2DecoderLayer")
_QWEN3_5 = _vllm("qwen3_5.Qwen3_5DecoderLayer")
_GEMMA4_LAYER = _vllm("gemma4.Gemma4DecoderLayer")
_DELTA: dict[str, Any] = {"stand_ins": ("gated delta rule",)}

ARCHITECTURES: dict[str, Architecture] = dict(
    [
        # (h, r): the stream is h + r.
        _of_family("llama", _LLAMA),
        _of_family("phi3", _LLAMA),
        _text("Ernie4_5", _LLAMA),
        _text("InternLM3", _LLAMA, hf_class="LlamaForCausalLM"),
        _text("IQuestCoder", _LLAMA, hf_class="LlamaForCausalLM"),
        _text("TeleChat3", _LLAMA, hf_class="LlamaForCausalLM"),
        _wrapper("SmolVLM", _LLAMA),
        _wrapper("Idefics3", _LLAMA),
        _wrapper("Llava", _LLAMA, fields=_CLIP),
        _wrapper("LlavaNext", _LLAMA, fields=_CLIP),
        _wrapper("PaddleOCRVL", _LLAMA, _MROPE),
        _of_family("mistral", _vllm("mistral.MistralDecoderLayer")),
        _text("Ministral3", _vllm("mistral.MistralDecoderLayer")),
        _wrapper("Mistral3", _vllm("mistral.MistralDecoderLayer")),
        _of_family("qwen2", _QWEN2),
        _wrapper("Qwen2VL", _QWEN2, _MROPE),
        _wrapper("Qwen2_5_VL", _QWEN2, _MROPE),
        _wrapper("InternVL", _QWEN2),
        _wrapper("LlavaOnevision", _QWEN2),
        _of_family("qwen3", _vllm("qwen3.Qwen3DecoderLayer")),
        _wrapper("Qwen3ASR", _vllm("qwen3.Qwen3DecoderLayer")),
        _wrapper("Qwen3VL", _vllm("qwen3_vl.Qwen3VLDecoderLayer")),
        _wrapper("Qwen3VLMoe", _vllm("qwen3_vl_moe.Qwen3VLMoeDecoderLayer"), _QWEN3_VL_MOE),
        _text("Qwen3Next", _vllm("qwen3_next.Qwen3NextDecoderLayer"), **_DELTA),
        _text("Qwen3_5", _QWEN3_5, **_DELTA),
        _text("Qwen3_5Moe", _QWEN3_5, **_DELTA),
        _wrapper("Qwen3_5", _QWEN3_5, **_DELTA),
        _wrapper("Qwen3_5Moe", _QWEN3_5, **_DELTA),
        _wrapper("MiniCPMV4_6", _QWEN3_5, **_DELTA),
        _of_family("qwen2moe", _vllm("qwen2_moe.Qwen2MoeDecoderLayer")),
        _of_family("qwen3moe", _vllm("qwen3_moe.Qwen3MoeDecoderLayer")),
        _of_family("mixtral", _vllm("mixtral.MixtralDecoderLayer")),
        _text("Olmoe", _vllm("olmoe.OlmoeDecoderLayer")),
        _text("Gemma", _vllm("gemma.GemmaDecoderLayer")),
        _wrapper("PaliGemma", _vllm("gemma.GemmaDecoderLayer")),
        _of_family("gemma2", _vllm("gemma2.Gemma2DecoderLayer")),
        _of_family("gemma3", _vllm("gemma3.Gemma3DecoderLayer")),
        _wrapper("Gemma3", _vllm("gemma3.Gemma3DecoderLayer"), TIED),
        _text("Glm4", _vllm("glm4.Glm4DecoderLayer")),
        _wrapper("Glm4v", _vllm("glm4.Glm4DecoderLayer"), _HALF_MROPE | {"attention_bias": True}),
        _wrapper("GlmOcr", _vllm("glm4.Glm4DecoderLayer"), _HALF_MROPE),
        _text("Glm4Moe", _vllm("glm4_moe.Glm4MoeDecoderLayer"), {"head_dim": HEAD_SIZE, "first_k_dense_replace": 1}),
        _wrapper(
            "Glm4vMoe",
            _vllm("glm4_moe.Glm4MoeDecoderLayer"),
            _HALF_MROPE | {"head_dim": HEAD_SIZE, "first_k_dense_replace": 1, "use_qk_norm": False},
        ),
        _text(
            "Glm4MoeLite",
            _vllm("glm4_moe_lite.Glm4MoeLiteDecoderLayer"),
            {"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
            environment=_NO_MLA,
        ),
        _of_family("deepseekv2", _vllm("deepseek_v2.DeepseekV2DecoderLayer"), environment=_NO_MLA),
        _text("DeepseekV3", _vllm("deepseek_v2.DeepseekV2DecoderLayer"), _SIGMOID, environment=_NO_MLA),
        _text("Llama4", _vllm("llama4.Llama4DecoderLayer"), _LLAMA4),
        _wrapper("Llama4", _vllm("llama4.Llama4DecoderLayer"), _LLAMA4),
        _text("MiMoV2Flash", _vllm("mimo_v2.MiMoV2FlashDecoderLayer"), _MIMO),
        _text("MiniMaxM2", _vllm("minimax_m2.MiniMaxM2DecoderLayer"), _MINIMAX, stand_ins=("sigmoid router",)),
        _of_family("gptoss", _vllm("gpt_oss.TransformerBlock")),
        _text(
            "HYV3",
            _vllm("hy_v3.HYV3DecoderLayer"),
            {"first_k_dense_replace": 1, "expert_hidden_dim": HIDDEN_SIZE, "qk_norm": True, "route_norm": True},
        ),
        _text("Ernie4_5_Moe", _vllm("ernie45_moe.Ernie4_5_MoeDecoderLayer")),
        _text("ExaoneMoe", _vllm("exaone_moe.ExaoneMoeDecoderLayer")),
        _text(
            "Afmoe",
            _vllm("afmoe.AfmoeDecoderLayer"),
            {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
        ),
        _text("AXK1", _vllm("AXK1.AXK1DecoderLayer"), {"first_k_dense_replace": 0}, environment=_NO_MLA),
        _text("Nemotron", _vllm("nemotron.NemotronDecoderLayer"), _SQUARES),
        _wrapper("Aria", _vllm("aria.AriaTextDecoderLayer")),
        _text("Mamba2", _vllm("mamba2.Mamba2DecoderLayer")),
        _text("Lfm2", _vllm("lfm2.Lfm2AttentionDecoderLayer lfm2.Lfm2ShortConvDecoderLayer"), _LFM2),
        _wrapper("Lfm2Vl", _vllm("lfm2.Lfm2AttentionDecoderLayer lfm2.Lfm2ShortConvDecoderLayer"), _LFM2),
        _text(
            "Lfm2Moe",
            _vllm("lfm2_moe.Lfm2MoeAttentionDecoderLayer lfm2_moe.Lfm2MoeShortConvDecoderLayer"),
            _LFM2,
        ),
        _text(
            "NemotronH",
            _vllm(
                "nemotron_h.NemotronHMambaDecoderLayer nemotron_h.NemotronHAttentionDecoderLayer "
                "nemotron_h.NemotronHMLPDecoderLayer"
            ),
            _NEMOTRON_H,
            engine=_NO_PREFIXES,
        ),
        # (h, x): the stream is h.
        _of_family("cohere", _vllm("commandr.CohereDecoderLayer")),
        _text("Cohere2", _vllm("commandr.CohereDecoderLayer"), _COHERE2),
        _wrapper("Cohere2Vision", _vllm("commandr.CohereDecoderLayer"), _COHERE2 | {"logit_scale": 1.0}),
        _text("Cohere2Moe", _vllm("cohere2_moe.Cohere2MoeDecoderLayer"), _COHERE2),
        _text("Exaone4", _vllm("exaone4.Exaone4DecoderLayer")),
        _wrapper("Exaone4_5_", _vllm("exaone4.Exaone4DecoderLayer")),
        _of_family("stablelm", _vllm("stablelm.StablelmDecoderLayer")),
        _text("HyperCLOVAX", _vllm("hyperclovax.HyperCLOVAXDecoderLayer")),
        _text(
            "GraniteMoeHybrid",
            _vllm(
                "granitemoehybrid.GraniteMoeHybridAttentionDecoderLayer "
                "granitemoehybrid.GraniteMoeHybridMambaDecoderLayer"
            ),
            _GRANITE | {"layer_types": ["mamba", "attention"] * 2},
            engine=_NO_PREFIXES,
        ),
        _text("Gemma4", _GEMMA4_LAYER, _GEMMA4_DENSE),
        _variant("Gemma4ForCausalLM", "experts", _GEMMA4_LAYER, _GEMMA4_EXPERTS),
        _variant("Gemma4ForCausalLM", "inputs by layer", _GEMMA4_LAYER, _GEMMA4_E),
        _wrapper("Gemma4", _GEMMA4_LAYER, _GEMMA4_DENSE),
        _wrapper("Gemma4Unified", _GEMMA4_LAYER, _GEMMA4_DENSE),
        # With a single head vLLM cannot decode one request alone: it writes the rotated part of the query onto itself.
        _text(
            "MiniCPM3",
            _vllm("minicpm3.MiniCPM3DecoderLayer"),
            {"scale_emb": 3, "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_HEADS},
        ),
        # The stream itself, (T, D).
        _of_family("gpt2", _vllm("gpt2.GPT2Block")),
        _text("GPTJ", _vllm("gpt_j.GPTJBlock")),
        _of_family("opt", _vllm("opt.OPTDecoderLayer")),
        _text(
            "Falcon",
            _vllm("falcon.FalconDecoderLayer"),
            {"ffn_hidden_size": 4 * HIDDEN_SIZE, "new_decoder_architecture": True},
        ),
        _variant(
            "FalconForCausalLM", "old block", _vllm("falcon.FalconDecoderLayer"), {"ffn_hidden_size": 4 * HIDDEN_SIZE}
        ),
        _of_family("granite", _vllm("granite.GraniteDecoderLayer")),
        _text("GraniteSWA", _vllm("granite.GraniteDecoderLayer"), _GRANITE),
        _text("GraniteMoe", _vllm("granitemoe.GraniteMoeDecoderLayer"), _GRANITE),
        _text("GraniteMoeShared", _vllm("granitemoeshared.GraniteMoeSharedDecoderLayer"), _GRANITE),
        _text("GraniteMoeSWA", _vllm("granitemoeshared.GraniteMoeSharedDecoderLayer"), _GRANITE),
        _text("FalconH1", _vllm("falcon_h1.FalconH1ParallelHybrid"), engine=_NO_PREFIXES),
        _text("Zamba2", _vllm("zamba2.Zamba2HybridLayer zamba2.Zamba2MambaDecoderLayer"), _ZAMBA2, engine=_NO_PREFIXES),
        # The stream itself, (1, T, D): transformers' own modules.
        _text("Arcee", _hugging_face("arcee", "ArceeDecoderLayer")),
        _text("Cwm", _hugging_face("cwm", "CwmDecoderLayer")),
        _text("FlexOlmo", _hugging_face("flex_olmo", "FlexOlmoDecoderLayer")),
        _text("Glm", _hugging_face("glm", "GlmDecoderLayer")),
        _text("GPTBigCode", _hugging_face("gpt_bigcode", "GPTBigCodeBlock")),
        _of_family("gptneox", _hugging_face("gpt_neox", "GPTNeoXLayer")),
        _text("HunYuanDenseV1", _hugging_face("hunyuan_v1_dense", "HunYuanDenseV1DecoderLayer")),
        _text("HunYuanMoEV1", _hugging_face("hunyuan_v1_moe", "HunYuanMoEV1DecoderLayer")),
        _text("Jais2", _hugging_face("jais2", "Jais2DecoderLayer"), _SQUARES),
        _text("Mellum", _hugging_face("mellum", "MellumDecoderLayer")),
        _text("Olmo", _hugging_face("olmo", "OlmoDecoderLayer")),
        _of_family("olmo2", _hugging_face("olmo2", "Olmo2DecoderLayer")),
        _text("Olmo3", _hugging_face("olmo3", "Olmo3DecoderLayer")),
        _of_family("phi", _hugging_face("phi", "PhiDecoderLayer")),
        _text("SeedOss", _hugging_face("seed_oss", "SeedOssDecoderLayer")),
        _text("SmolLM3", _hugging_face("smollm3", "SmolLM3DecoderLayer")),
        _text("Starcoder2", _hugging_face("starcoder2", "Starcoder2DecoderLayer")),
        _text("VaultGemma", _hugging_face("vaultgemma", "VaultGemmaDecoderLayer")),
    ]
)

# Each convention, several layer classes in one model, states besides attention's, wrappers, experts, windows.
REPRESENTATIVE = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Gemma4ForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "NemotronHForCausalLM",
    "Lfm2ForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "Cohere2ForCausalLM",
    "Olmo3ForCausalLM",
)
