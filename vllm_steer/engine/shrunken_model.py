"""Runs the experiment of an engine's start on a small random copy of a model, made from its config alone.

    python -m vllm_steer.engine.shrunken_model CONFIG_FOLDER ENGINE_ARGUMENTS_AS_JSON

A process of its own, because vLLM's process groups and the changes to its classes stay in the process that makes them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_steer.engine.worker_answers import ModelRecord, whole_model
from vllm_steer.errors import SettingsError, SteerError, UnsupportedModel
from vllm_steer.settings import steer_config

FEWEST_LAYERS, MOST_LAYERS = 4, 12
HEAD = 32  # the smallest that vLLM's attention on a CPU takes


def _sizes(*rows: tuple[int, str]) -> dict[str, int]:
    return {name: size for size, names in rows for name in names.split()}


# Names of a config's fields -> the largest value that the copy keeps. They only need to fit each other.
_TEXT = _sizes(
    (128, "hidden_size n_embd d_model word_embed_proj_dim moe_intermediate_size expert_ffn_hidden_size"),
    (128, "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    (256, "intermediate_size ffn_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size mamba_d_ssm"),
    (256, "mamba_intermediate_size mlp_hidden_size prefix_dense_intermediate_size"),
    (128, "conv_dim block_dim"),
    (256, "block_ff_dim"),
    (4, "num_attention_heads n_head n_heads swa_num_attention_heads linear_num_value_heads num_attn_heads"),
    (4, "linear_num_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads"),
    (HEAD, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim"),
    (HEAD, "mamba_d_head mamba_head_dim mamba_headdim global_head_dim swa_head_dim swa_v_head_dim rotary_dim"),
    (HEAD, "attention_head_dim index_head_dim linear_head_dim"),
    (64, "kv_lora_rank q_lora_rank mamba_dt_rank time_step_rank"),
    (6, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts num_experts_per_token index_n_heads"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace"),
    (1, "num_dense_layers mamba_n_groups mamba_ngroups n_groups moe_layer_start_index"),
    (16, "mamba_d_state ssm_state_size state_size hidden_size_per_layer_input laurel_rank"),
    (8, "mamba_n_heads n_mamba_heads mamba_num_heads"),
    (0, "num_nextn_predict_layers num_mtp_layers mtp_num_hidden_layers num_kv_shared_layers"),
)
_TOWER = _sizes(
    (64, "hidden_size d_model width encoder_dim embed_dim"),
    (128, "intermediate_size mlp_dim encoder_ffn_dim ffn_dim"),
    (2, "num_hidden_layers n_layer num_layers depth layers encoder_layers num_attention_heads num_heads heads"),
    (2, "encoder_attention_heads num_key_value_heads attention_heads"),
    (HEAD, "head_dim"),
    (128, "out_hidden_size projection_dim output_dim"),
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PERIODS = ("attn_layer_period", "full_attention_interval", "expert_layer_period", "sliding_window_pattern")
_TEXT_PARTS = ("text", "llm", "language", "thinker", "decoder")


def shrunken(config: Mapping[str, Any], *, is_text: bool = True) -> dict[str, Any]:
    """A config of the same model with few and small layers, all kinds of layers among them.

    Args:
        config: the content of a ``config.json``.
        is_text: False for the part of a config that describes a tower for images or sound.
    """
    table = _TEXT if is_text else _TOWER
    small = {name: _at_most(value, table.get(name)) for name, value in config.items()}
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            small[name] = shrunken(value, is_text=name.startswith(_TEXT_PARTS))
    if is_text:
        _keep_kinds_of_layers(config, small)
        head = small.get("head_dim") or small.get("qk_rope_head_dim") or HEAD
        for name in ("rope_parameters", "rope_scaling"):
            if isinstance(config.get(name), Mapping):
                small[name] = _plain_rope(config[name], head, config.get("partial_rotary_factor", 1.0))
    small.pop("quantization_config", None)
    return small


def _at_most(value: Any, limit: int | None) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return min(value, limit) if is_number and limit is not None else value


def _keep_kinds_of_layers(config: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Cut the number of layers, and every field with one item a layer, to few layers of all kinds."""
    counts = [name for name in _LAYERS if isinstance(config.get(name), int)]
    if not counts:
        return
    total = config[counts[0]]
    each = [name for name, value in config.items() if isinstance(value, list | str) and len(value) == total]
    each = [name for name in each if isinstance(config[name], list) or name.endswith("pattern")]
    kinds = [tuple(str(config[name][layer]) for name in each) for layer in range(total)]
    least = max(FEWEST_LAYERS, *(_at_most(config.get(name) or 0, MOST_LAYERS) for name in _PERIODS))
    kept = sorted({kinds.index(kind) for kind in kinds} | set(range(min(least, total))))[:MOST_LAYERS]
    for name in counts:
        small[name] = len(kept)
    for name in each:
        items = [config[name][layer] for layer in kept]
        small[name] = "".join(items) if isinstance(config[name], str) else items


def _plain_rope(rope: Mapping[str, Any], head: int, share: float) -> dict[str, Any]:
    """Rotary settings without tables for the original size of a head."""
    if any(isinstance(value, Mapping) for value in rope.values()):  # one for each kind of layer
        return {kind: _plain_rope(one, head, share) if isinstance(one, Mapping) else one for kind, one in rope.items()}
    share = rope.get("partial_rotary_factor", share)
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor", "mrope_interleaved") if name in rope}
    for name in rope.keys() & {"mrope_section", "xdrope_section"}:
        half = int(head * share) // 2
        sections = [half * one // sum(rope[name]) for one in rope[name]]
        kept[name] = [half - sum(sections[1:]), *sections[1:]]
    return {"rope_type": "default", **kept}


def examine_shrunken(model: str, config: PreTrainedConfig, engine_args: Mapping[str, Any]) -> ModelRecord:
    """Run the experiment on a shrunken copy of a model in another process; seconds, and little memory.

    Args:
        model: local folder or hub id.
        config: its config, with its architectures.
        engine_args: arguments of ``vllm.LLM`` for the copy, as JSON can hold them.

    Returns:
        As ``model_record``.

    Raises:
        UnsupportedModel: the experiment refuses the model.
        SettingsError: vLLM cannot make the copy.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-steer-shrunken-") as folder:
        settings = shrunken(config.to_dict()) | {"architectures": config.architectures}
        (Path(folder) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for module in Path(model).glob("*.py"):  # of a model that brings its own code
            shutil.copy(module, folder)
        command = [sys.executable, "-m", __name__, folder, json.dumps(dict(engine_args))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    answer = _last_json(done.stdout)
    if answer is None:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise SettingsError(
            f"vLLM cannot make a shrunken copy of {model}: {last}. The model itself may load all the same; "
            "start an engine to see."
        )
    if "refused" in answer:
        raise UnsupportedModel(answer["refused"])
    return answer


def _environment() -> dict[str, str]:
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}


def _last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    return None


def main(arguments: Sequence[str]) -> None:
    """Load the model of a config folder with random weights and print the record of the experiment as JSON."""
    folder, given = arguments
    args = EngineArgs(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=2,
        gpu_memory_utilization=0.1,
        additional_config=steer_config(layers=[0], unproven_model="experiment"),
        **json.loads(given),
    )
    try:
        executor = UniProcExecutor(args.create_engine_config())
        answer: dict[str, Any] = whole_model([executor.collective_rpc("vllm_steer_model")])
    except SteerError as refusal:
        answer = {"refused": str(refusal)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
