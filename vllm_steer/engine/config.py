"""Start-up: check the settings and refuse what would not be exact, before any weight is loaded."""

from __future__ import annotations

import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_steer.engine.decoder_layers import family_of
from vllm_steer.errors import LayerNotHooked, UnsupportedFeature
from vllm_steer.settings import CONFIG_KEY, SteerSettings


def install(unsupported: str | None = None) -> None:
    """Wrap ``EngineArgs.create_engine_config`` (see ``vllm_steer.engine``).

    Args:
        unsupported: why no engine can be steered at all; then every engine that is configured for it is refused,
            and all others are left alone.
    """
    original = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        settings = SteerSettings.of(config.additional_config)
        if settings is not None:
            if unsupported is not None:
                raise UnsupportedFeature(unsupported)
            check(config, settings)
            # A new dict: the one that is there is the caller's.
            config.additional_config = {**config.additional_config, CONFIG_KEY: settings.as_config()}
        return config

    EngineArgs.create_engine_config = create_engine_config


def check(config: Any, settings: SteerSettings) -> None:
    """Refuse a model or feature of a ``VllmConfig`` with which steering or readout would not be exact.

    Raises:
        UnsupportedModel, LayerNotHooked, UnsupportedFeature: naming what was found, what works and what to do.
    """
    model = config.model_config
    family_of(model.architecture)
    layers = model.get_total_num_hidden_layers()
    beyond = [layer for layer in settings.layers if layer >= layers]
    if beyond:
        raise LayerNotHooked(
            f"steer_config names layer {beyond[0]}; {model.model} has layers 0 to {layers - 1}. Correct layers=[...]."
        )
    for is_on, feature, instead in _features(config):
        if is_on:
            raise UnsupportedFeature(f"steering was asked together with {feature}; not exact there. {instead}")


def _features(config: Any) -> list[tuple[bool, str, str]]:
    parallel = config.parallel_config
    return [
        (config.use_v2_model_runner, "vLLM's V2 model runner", "Set VLLM_USE_V2_MODEL_RUNNER=0 for the classic one."),
        (config.speculative_config is not None, "speculative decoding", "Start without speculative_config."),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism", "Set pipeline_parallel_size=1."),
        (parallel.data_parallel_size > 1, "data parallelism", "Run one engine a replica instead."),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", "Set it to 1."),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism", "Set it to 1."),
        (parallel.use_ubatching, "micro-batching (DBO)", "Start without enable_dbo."),
        (config.cache_config.kv_sharing_fast_prefill, "kv_sharing_fast_prefill", "Start without it."),
        (parallel.use_sequence_parallel_moe, "sequence-parallel MoE", "Start without expert parallelism."),
        (config.lora_config is not None, "LoRA", "Merge the adapter into the weights."),
        (config.kv_transfer_config is not None, "a KV connector", "Start without kv_transfer_config."),
        (config.model_config.runner_type != "generate", "a pooling model", "Use a model that generates text."),
    ]
