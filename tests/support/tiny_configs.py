"""What tiny models are made of: the sizes, the twenty families with all their fields, and small configs of any class.

Four blocks, hidden size 128. The head size is 32 because that is the smallest one vLLM's CPU attention accepts.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

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

Fields = dict[str, Any]


_SHARED: Fields = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "float32",
}
_ROTARY: Fields = _SHARED | {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": INIT_STD,
    "tie_word_embeddings": False,
}
_EXPERTS: Fields = {
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": HIDDEN_SIZE,
    "norm_topk_prob": True,
}
ALTERNATING: Fields = {"layer_types": ["sliding_attention", "full_attention"] * 2}
# Sliding windows shorter than the prompts, as every other layer of these families has them.
_WINDOWED: Fields = ALTERNATING | {"sliding_window": 32}
_YARN: Fields = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_POSITIONS // 4,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
TIED: Fields = {
    "tie_word_embeddings": True,  # vLLM's classes have no head of their own
    # Scaled embeddings and a tied head repeat the last token for ever, unless the layers outweigh the embeddings.
    "initializer_range": INIT_STD / 3,
}
_GEMMA: Fields = _WINDOWED | TIED | {"head_dim": HEAD_SIZE, "query_pre_attn_scalar": HEAD_SIZE}

# Short name -> architecture, all fields of its config. Special features are on, with factors other than 1.
FAMILIES: dict[str, tuple[str, Fields]] = {
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
# Models whose decoder layers are not in the table: one that vLLM computes otherwise than Hugging Face, by more than the
# tolerances, and one that could be there.
REFUSED: dict[str, tuple[str, Fields]] = {
    "bloom": ("BloomForCausalLM", _SHARED | {"hidden_size": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": NUM_HEADS}),
    "helium": ("HeliumForCausalLM", _ROTARY | {"head_dim": HEAD_SIZE}),
}


def _by_name(*rows: tuple[Any, str]) -> Fields:
    return {name: value for value, names in rows for name in names.split()}


_TEXT = _by_name(
    (HIDDEN_SIZE, "hidden_size n_embd d_model word_embed_proj_dim moe_intermediate_size expert_ffn_hidden_size"),
    (HIDDEN_SIZE, "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    (2 * HIDDEN_SIZE, "intermediate_size ffn_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    (2 * HIDDEN_SIZE, "mamba_d_ssm mamba_intermediate_size mlp_hidden_size prefix_dense_intermediate_size"),
    (NUM_LAYERS, "num_hidden_layers n_layer n_layers num_layers"),
    (NUM_HEADS, "num_attention_heads n_head n_heads swa_num_attention_heads linear_num_value_heads num_attn_heads"),
    (NUM_HEADS, "linear_num_heads"),
    (NUM_KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (NUM_KV_HEADS, "num_global_key_value_heads"),
    (HEAD_SIZE, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim"),
    (HEAD_SIZE, "mamba_d_head mamba_head_dim mamba_headdim global_head_dim swa_head_dim swa_v_head_dim"),
    (HEAD_SIZE, "attention_head_dim rotary_dim index_head_dim linear_head_dim query_pre_attn_scalar"),
    (32, "sliding_window"),  # shorter than the prompts
    (32, "chunk_size mamba_chunk_size"),  # transformers computes a whole chunk for the shortest text
    (64, "kv_lora_rank q_lora_rank mamba_dt_rank time_step_rank"),
    (NUM_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts num_experts_per_token index_n_heads"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace"),
    (1, "num_dense_layers mamba_n_groups mamba_ngroups n_groups moe_layer_start_index"),
    (16, "mamba_d_state ssm_state_size state_size hidden_size_per_layer_input laurel_rank"),
    (8, "mamba_n_heads n_mamba_heads mamba_num_heads num_heads"),
    (VOCAB_SIZE, "vocab_size vocab_size_per_layer_input"),
    (MAX_POSITIONS, "max_position_embeddings n_positions max_seq_len original_max_position_embeddings"),
    (INIT_STD, "initializer_range init_std initializer_std"),
    (0.0, "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop router_jitter_noise input_jitter_noise"),
    (0, "num_nextn_predict_layers num_mtp_layers mtp_num_hidden_layers"),
    (1, "bos_token_id"),
    (2, "eos_token_id pad_token_id eod_token_id"),
)
_TOWER = _by_name(
    (64, "hidden_size d_model width encoder_dim embed_dim num_position_embeddings position_embedding_size"),
    (128, "intermediate_size mlp_dim encoder_ffn_dim ffn_dim"),
    (2, "num_hidden_layers n_layer num_layers depth layers encoder_layers num_attention_heads num_heads heads"),
    (2, "encoder_attention_heads num_key_value_heads attention_heads"),
    (HEAD_SIZE, "head_dim global_head_dim"),
    (HIDDEN_SIZE, "out_hidden_size projection_dim vision_output_dim projector_output_dim projector_input_dim"),
    (HIDDEN_SIZE, "output_dim"),
    (56, "image_size"),
)
_TEXT_CONFIGS = ("text", "llm", "language", "thinker", "decoder")


def small_config(config_class: Any, fields: Fields, sizes: Fields = _TEXT) -> Fields:
    """Fields of a small config of `config_class`: the sizes of its well-known names, with `fields` over them.

    Nested configs are made small in the same way. What has one item a layer is left to the class to derive.
    """
    defaults = _defaults(config_class)
    names = set(defaults) | set(config_class.attribute_map.values())
    nested = config_class.sub_configs
    values = {
        name: sizes[name]
        for name in names - set(nested)
        if name in sizes and isinstance(defaults.get(name), int | float | None | list | tuple)
    }
    for name, inner in nested.items():
        if not hasattr(inner, "base_config_key"):  # any config: the one it is by default
            inner = type(getattr(config_class(), name))
        small = small_config(inner, fields.get(name, {}), _TEXT if name.startswith(_TEXT_CONFIGS) else _TOWER)
        values[name] = {"model_type": inner.model_type, **small}
    if "kv_lora_rank" in names:  # latent attention: vLLM's CPU kernel rotates several heads wrongly
        values |= {name: 1 for name in ("num_attention_heads", "num_key_value_heads") if name in values}
    return values | {name: value for name, value in fields.items() if name not in nested}


def _defaults(config_class: Any) -> Fields:
    if dataclasses.is_dataclass(config_class):
        return {
            one.name: None if one.default is dataclasses.MISSING else one.default
            for one in dataclasses.fields(config_class)
        }
    parameters = inspect.signature(config_class.__init__).parameters
    return {name: one.default for name, one in parameters.items() if name != "self"}
