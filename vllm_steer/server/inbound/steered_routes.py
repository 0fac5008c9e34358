"""The POST routes of vLLM's server that honour steering, a readout or an alias, and those that refuse them.

A route that is in none of the lists refuses them, so a route of a later vLLM never ignores steering. A test compares
the lists with the routes of the installed vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
CHAT_BATCH, MESSAGES = "/v1/chat/completions/batch", "/v1/messages"
INVOCATIONS, TOKENS = "/invocations", "/inference/v1/generate"
COHERE = "/cohere/v2/chat"
LORA_NAMES = {"/v1/load_lora_adapter": "lora_name", "/adapters": "name"}
"""Route that loads a LoRA module -> the field of its body that names the module."""


@dataclass(frozen=True, slots=True)
class SteeredRoute:
    """A route whose requests the engine generates for.

    Attributes:
        reads: whether its replies have a place for readouts.
        extra: path of keys to ``extra_args`` in its bodies; empty if vLLM reads none.
    """

    reads: bool = True
    extra: tuple[str, ...] = ("vllm_xargs",)


STEERED = {
    CHAT: SteeredRoute(),
    CHAT_BATCH: SteeredRoute(),
    COMPLETIONS: SteeredRoute(),
    RESPONSES: SteeredRoute(),
    MESSAGES: SteeredRoute(),
    INVOCATIONS: SteeredRoute(),  # SageMaker's name for chat and completions
    TOKENS: SteeredRoute(extra=("sampling_params", "extra_args")),
    COHERE: SteeredRoute(reads=False),
    "/generative_scoring": SteeredRoute(reads=False, extra=()),
    "/v1/systemone": SteeredRoute(reads=False, extra=()),
    "/v1/decisions": SteeredRoute(reads=False, extra=()),  # OpenAI's form of the same; vLLM has it from 0.33 on
}

NAMING = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
"""Routes that only count or split text. Steering does not change that, so an alias stands for its model."""

REFUSING = frozenset(
    {
        # They render a request for another server, which would not know of the steering.
        *("/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render", "/v1/responses/render"),
        *("/cohere/v2/chat/render", "/v1/chat/completions/derender", "/v1/completions/derender"),
        # Models that embed, score or transcribe, which are refused at start-up.
        *("/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
        *("/v1/embeddings", "/v2/embed", "/v1/audio/transcriptions", "/v1/audio/translations"),
        # They generate nothing.
        *(*LORA_NAMES, "/v1/unload_lora_adapter", "/v1/responses/{response_id}/cancel", "/ping"),
        *("/inference/v1/abort_requests", "/abort_requests", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
        *("/start_profile", "/stop_profile", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
        *("/collective_rpc", "/sleep", "/wake_up", "/release_kv_cache_memory", "/pause", "/resume"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
        *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
        *("/weight_checker", "/fault_tolerance/apply"),
    }
)
