"""Checks at start-up: settings, models and features that would not be exact are refused before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from vllm_steer.engine import vllm_versions
from vllm_steer.engine.layer_classes import classes_compared_for, refuse_architecture, refuse_rescaled
from vllm_steer.engine.log import logger
from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.engine.registry import MANY, bank_size, check_room, reading_memory
from vllm_steer.errors import LayerNotHooked, SettingsError, SteerError, UnsupportedFeature, UnsupportedModel
from vllm_steer.settings import CONFIG_KEY, SteerSettings

_install_batch_runner: Callable[[], None]


def install() -> None:
    """Install the patch of the engine's configuration."""
    CREATE_ENGINE_CONFIG.install()


def prepare_batch_runner(install_batch_runner: Callable[[], None]) -> None:
    """Set the function to call when an engine is configured for vLLM's batch runner."""
    global _install_batch_runner
    _install_batch_runner = install_batch_runner


def _create_engine_config(original: Any) -> Any:
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        settings = SteerSettings.of(config.additional_config)
        if settings is not None:
            unsupported = vllm_versions.unsupported_reason()
            if unsupported is not None:
                raise UnsupportedFeature(unsupported)
            check(config, settings)
            _check_bank(config, settings)
            context = kwargs.get("usage_context", args[0] if args else None)
            if context == UsageContext.OPENAI_API_SERVER:
                _check_endpoints()
            if context != UsageContext.LLM_CLASS:
                from vllm_steer.engine.front import async_generate

                async_generate.install()
            if context == UsageContext.OPENAI_BATCH_RUNNER:
                _install_batch_runner()
            remark = vllm_versions.remark(vllm_versions.vllm_version())
            if remark is not None:
                logger.warning_once(remark)
            if config.use_v2_model_runner:
                logger.warning_once(
                    "vllm-steer has not been run on an accelerator with vLLM's V2 model runner yet, only on a CPU with "
                    "its kernels interpreted; VLLM_USE_V2_MODEL_RUNNER=0 chooses the classic runner."
                )
            # A new dict, because the present one belongs to the caller.
            ADDITIONAL_CONFIG.put(config, {**config.additional_config, CONFIG_KEY: settings.as_config()})
        return config

    return create_engine_config


def _check_bank(config: Any, settings: SteerSettings) -> None:
    """Refuse more configured directions than slots, and say what memory bank and directions take."""
    hidden_size = config.model_config.get_hidden_size()
    num_directions = check_room(settings, hidden_size)
    slots = settings.max_directions
    logger.info("max_directions=%d: the bank takes %s.", slots, bank_size(slots, hidden_size))
    if num_directions >= MANY:
        logger.info("%s.", reading_memory(num_directions, hidden_size))


def _check_endpoints() -> None:
    """Refuse a server without the plugin's endpoints: it would silently ignore all steering outside ``vllm_xargs``."""
    chosen = os.environ.get("VLLM_PLUGINS")
    if CONFIG_KEY not in (chosen or "").split(","):
        raise SettingsError(
            f"a server was configured for steering and VLLM_PLUGINS is {chosen!r}, with which vLLM loads none of its "
            "endpoints: it would ignore aliases, default steering and the steering field of bodies; allowed: a list "
            f"with {CONFIG_KEY}. Set VLLM_PLUGINS={CONFIG_KEY}."
        )


def check(config: Any, settings: SteerSettings) -> None:
    """Refuse a model or feature with which steering or readouts would not be exact.

    Args:
        config: vLLM's ``VllmConfig``.
        settings: the engine's settings.

    Raises:
        UnsupportedModel, LayerNotHooked, UnsupportedFeature: the first of ``refusals``.
    """
    for refusal in refusals(config, settings):
        raise refusal


def refusals(config: Any, settings: SteerSettings) -> Iterator[SteerError]:
    """Yield every refusal of ``check``; each names what was found, what works and what to do."""
    model = config.model_config
    try:
        for architecture in dict.fromkeys((model.architecture, *model.architectures)):
            refuse_architecture(architecture, config.parallel_config.tensor_parallel_size)
            refuse_rescaled(frozenset(row.path for row in classes_compared_for(architecture)), model.dtype)
    except UnsupportedModel as error:
        yield error
    layers = model.get_total_num_hidden_layers()
    beyond = [layer for layer in settings.layers if layer >= layers]
    if beyond:
        yield LayerNotHooked(
            f"steer_config names layer {beyond[0]}; {model.model} has layers 0 to {layers - 1}. Correct layers=[...]."
        )
    for one in _features(config):
        if one.is_on:
            yield UnsupportedFeature(
                f"steering was asked together with {one.feature}; not exact there: {one.why}. {one.do}."
            )


class Refused(NamedTuple):
    """An engine feature that is refused together with steering.

    Attributes:
        is_on: whether the engine has it.
        feature: its name.
        why: why steering or a readout would not be exact, or would not be known to be.
        do: what to do instead.
    """

    is_on: bool
    feature: str
    why: str
    do: str


def refused_features(config: Any) -> list[str]:
    """All engine features that ``check`` refuses with the runner of ``config``, enabled or not, each with why."""
    return [f"{one.feature}: {one.why}" for one in _features(config)]


_NOT_COMPARED = "both together were never compared with Hugging Face"


def _features(config: Any) -> list[Refused]:
    parallel = config.parallel_config
    return [
        *_features_of_v2(config),
        *_features_of_speculation(config),
        *_features_of_pipelines(config),
        Refused(
            parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb,
            "data parallelism with a front end for each rank or node",
            "each front end would have directions of its own",
            "Let one front end serve all ranks, or start each replica as a server of its own",
        ),
        Refused(
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism",
            "each rank holds a part of a prompt's tokens, so its sums are parts too",
            "Set it to 1",
        ),
        Refused(
            parallel.decode_context_parallel_size > 1,
            "decode context parallelism",
            "it was never compared with Hugging Face",
            "Set it to 1",
        ),
        Refused(
            parallel.use_ubatching,
            "micro-batching (DBO)",
            "a step runs as several batches, and one is planned",
            "Start without enable_dbo",
        ),
        Refused(
            config.cache_config.kv_sharing_fast_prefill,
            "kv_sharing_fast_prefill",
            "some layers skip prompt tokens, which would be neither steered nor read",
            "Start without it",
        ),
        Refused(
            parallel.use_sequence_parallel_moe,
            "sequence-parallel MoE",
            "each rank holds a part of the tokens",
            "Start without expert parallelism",
        ),
        Refused(
            config.kv_transfer_config is not None,
            "a KV connector",
            "keys and values from elsewhere say nothing of the steering under which they were computed",
            "Start without kv_transfer_config",
        ),
        Refused(
            config.model_config.enable_sleep_mode,
            "sleep mode",
            "a sleeping engine has freed the memory of its directions and readouts",
            "Start without enable_sleep_mode",
        ),
        Refused(
            config.model_config.runner_type != "generate",
            "a pooling model",
            "it generates no tokens",
            "Use a model that generates text",
        ),
        Refused(
            envs.VLLM_USE_RUST_FRONTEND,
            "vLLM's Rust front end",
            "it admits requests in a process without Python, where nothing can check them",
            "Start without VLLM_USE_RUST_FRONTEND",
        ),
    ]


def _features_of_pipelines(config: Any) -> list[Refused]:
    is_pipeline = config.parallel_config.pipeline_parallel_size > 1
    beside = {
        "asynchronous scheduling": (config.scheduler_config.async_scheduling, "Set async_scheduling=False"),
        "speculative decoding": (config.speculative_config is not None, "Start without one of them"),
        "LoRA": (config.lora_config is not None, "Start without one of them"),
    }
    return [
        Refused(is_pipeline and is_on, f"pipeline parallelism and {feature} at once", _NOT_COMPARED, do)
        for feature, (is_on, do) in beside.items()
    ]


# Requests that admission refuses with steering or a readout; each with the reason.
REFUSED_REQUESTS = (
    "beam search: it computes generated tokens again as prompt tokens",
    "prompt embeddings: steering of a prompt without token ids was never compared with Hugging Face",
    "streaming input: the prompt grows while it is read",
    "pooling: such a request generates no tokens",
)


# Whoever makes the drafts, the model itself decides which of them become output. Only what was compared is listed.
_BY_NO_MODEL = ("ngram", "suffix")
_BY_A_MODEL = ("draft_model", "eagle", "eagle3", "mtp", "medusa")
_WHY_NOT = {
    "extract_hidden_states": "it drafts nothing and hands hidden states to a KV connector; a Readout returns them here",
    "mlp_speculator": "vLLM's classic runner has no such method",
    "dspark": "only vLLM's V2 model runner has this method, and speculation was not compared there",
}


def _features_of_speculation(config: Any) -> list[Refused]:
    """What was not compared with Hugging Face among the ways to make and to verify drafts."""
    speculation = config.speculative_config
    method = None if speculation is None else speculation.method
    allowed = ", ".join(map(repr, _BY_NO_MODEL + _BY_A_MODEL))
    is_other = method not in (None, *_BY_NO_MODEL, *_BY_A_MODEL)
    reason = _WHY_NOT.get(str(method), "its drafts were never compared with output without drafts")
    return [
        Refused(
            is_other,
            f"speculative decoding by {repr(method) if is_other else f'anything but {allowed}'}",
            reason,
            f"Use one of {allowed}, or start without speculative_config",
        ),
        # vLLM schedules synchronously by itself with n-grams, suffixes and Medusa, on accelerators not with the others.
        Refused(
            method is not None and config.scheduler_config.async_scheduling,
            "speculative decoding and asynchronous scheduling at once",
            "a step is planned there before the host knows which drafts of the last one were accepted",
            "Set async_scheduling=False",
        ),
        Refused(
            getattr(speculation, "rejection_sample_method", None) == "synthetic",
            "speculative decoding with rejection_sample_method='synthetic'",
            "it accepts drafts by chance, so the output is not the model's",
            "Set it to 'standard'",
        ),
        Refused(
            method in _BY_A_MODEL and config.lora_config is not None,
            "LoRA and drafts by a model at once",
            _NOT_COMPARED,
            "Start without one of them, or with the method 'ngram'",
        ),
    ]


def _features_of_v2(config: Any) -> list[Refused]:
    """Features that are exact on the classic runner and untested on the V2 runner; none with the classic runner."""
    if not config.use_v2_model_runner:
        return []
    features = {
        "speculative decoding": (
            config.speculative_config is not None,
            "on the host, the number of computed tokens is an upper bound until rejected drafts are known",
        ),
        "LoRA": (config.lora_config is not None, _NOT_COMPARED),
        "pipeline parallelism": (config.parallel_config.pipeline_parallel_size > 1, _NOT_COMPARED),
    }
    do = "Set VLLM_USE_V2_MODEL_RUNNER=0 for the classic one"
    return [
        Refused(is_on, f"{feature} on vLLM's V2 model runner", why, do) for feature, (is_on, why) in features.items()
    ]


CREATE_ENGINE_CONFIG = patch(
    EngineArgs,
    "create_engine_config",
    _create_engine_config,
    takes="self, usage_context, ...",
    why="Settings must be checked, and models and features refused, before any weight is loaded; the plugin's build "
    "must enter the compile cache's key.",
    gone_when="vLLM lets a plugin validate the engine's configuration.",
)
ADDITIONAL_CONFIG: Attribute[dict[str, Any]] = Attribute(
    "VllmConfig",
    "additional_config",
    why="Carries the checked settings, with the plugin's build, to the workers and into the compile cache's key.",
    gone_when="vLLM lets a plugin validate the engine's configuration.",
)
