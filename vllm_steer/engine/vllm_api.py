"""Every part of vLLM that the plugin relies on; ``tests/compat`` checks the list against any release.

There are three kinds of parts: names (a class, a function, an attribute, a member of an enumeration), signatures, and
expressions inside a function whose effect we rely on. The table of ``layer_classes`` is a separate list.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VllmName:
    """One part of vLLM that must exist in the form described here.

    Attributes:
        module: the module it is imported from or defined in, such as ``vllm.outputs``.
        name: ``function``, ``Class``, ``Class.method`` or ``Class.attribute``; ``function.attribute`` for an attribute
            that the function sets on another object; empty for the module itself.
        takes: the parameters that we name, in order; None for a part that we do not call. A leading ``async`` or
            ``static`` gives the kind of function, ``name=`` is passed by keyword, ``*`` ends the positional parameters,
            and a final ``...`` allows further parameters: any for a patched function, else only optional ones.
        contains: an expression in its source, as ``ast.unparse`` writes it.
        is_patched: we replace it with a wrapper, which nothing may bypass: no other module may hold it by name, and no
            other subclass may override it.
        needed_by: our file that needs it, where a search of our source cannot tell.
    """

    module: str
    name: str
    takes: str | None = None
    contains: str | None = None
    is_patched: bool = False
    needed_by: str | None = None


def _members(module: str, owner: str, names: str) -> tuple[VllmName, ...]:
    return tuple(VllmName(module, f"{owner}.{name}") for name in names.split())


_ARGS = "vllm.engine.arg_utils"
_CONFIG = "vllm.config.vllm"
_MODEL_CONFIG = "vllm.config.model"
_SAMPLING = "vllm.sampling_params"
_ENDPOINT_PLUGIN = "vllm.plugins.endpoint_plugins.interface"
_PROCESSOR = "vllm.v1.engine.input_processor"
_OFFLINE_ENGINE = "vllm.v1.engine.llm_engine"
_ASYNC = "vllm.v1.engine.async_llm"
_CLIENT = "vllm.v1.engine.core_client"
_CORE = "vllm.v1.engine.core"
_SERVED_MODELS = "vllm.entrypoints.openai.models.serving"
_SERVE = "vllm.entrypoints.cli.serve"
_BATCH_RUNNER = "vllm.entrypoints.launchers.run_batch"
_CHAT_BODIES = "vllm.entrypoints.openai.chat_completion.protocol"
_SCHEDULED = "vllm.v1.core.sched.output"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_WORKER = "vllm.v1.worker.worker_base"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_CPU_RUNNER = "vllm.v1.worker.cpu_model_runner"
_BATCH = "vllm.v1.worker.gpu_input_batch"
_CPU_LORA = "vllm.lora.punica_wrapper.punica_cpu"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
_STATES_V2 = "vllm.v1.worker.gpu.model_states"
_STATE_V2 = f"{_STATES_V2}.interface"
_HASH_HOLDERS = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")

VLLM_NAMES = (
    # Discovery of the plugin, and its settings.
    VllmName(
        "vllm.plugins", "DEFAULT_PLUGINS_GROUP", contains="'vllm.general_plugins'", needed_by="engine/vllm_versions.py"
    ),
    VllmName(
        "vllm.plugins", "ENDPOINT_PLUGINS_GROUP", contains="'vllm.endpoint_plugins'", needed_by="server/endpoints.py"
    ),
    VllmName(_ENDPOINT_PLUGIN, "EndpointPlugin.name", needed_by="server/endpoints.py"),
    VllmName(_ENDPOINT_PLUGIN, "EndpointPlugin.required_tasks", needed_by="server/endpoints.py"),
    VllmName(_ENDPOINT_PLUGIN, "EndpointPlugin.attach_router", "self, app"),
    VllmName(_ENDPOINT_PLUGIN, "EndpointPlugin.init_state", "async self, engine_client, state, args"),
    VllmName("vllm.logger", "init_logger", "name"),
    VllmName(_ARGS, "EngineArgs"),
    *_members(_ARGS, "EngineArgs", "model additional_config"),
    VllmName("vllm.usage.usage_lib", "UsageContext"),
    *_members("vllm.usage.usage_lib", "UsageContext", "LLM_CLASS OPENAI_API_SERVER OPENAI_BATCH_RUNNER"),
    VllmName("vllm.envs", ""),
    VllmName("vllm.envs", "VLLM_USE_RUST_FRONTEND"),
    # The engine's configuration. Its hash is the key of the compile cache and must cover our settings.
    VllmName(
        _CONFIG, "VllmConfig.compute_hash", contains="self.additional_config", needed_by="engine/startup_checks.py"
    ),
    *(
        VllmName(module, name, contains="vllm_config.compute_hash()", needed_by="engine/startup_checks.py")
        for module, name in (
            ("vllm.compilation.caching", "aot_compile_hash_factors"),
            ("vllm.compilation.backends", "VllmBackend"),
        )
    ),
    *_members(
        _CONFIG,
        "VllmConfig",
        "additional_config cache_config compilation_config kv_transfer_config lora_config model_config "
        "num_speculative_tokens parallel_config scheduler_config speculative_config use_v2_model_runner",
    ),
    *_members(
        _MODEL_CONFIG,
        "ModelConfig",
        "_model_info architecture architectures dtype enable_sleep_mode model model_impl runner_type",
    ),
    VllmName("vllm.model_executor.models.registry", "_ModelInfo.architecture"),
    VllmName(_MODEL_CONFIG, "ModelConfig.get_total_num_hidden_layers", "self"),
    VllmName(_MODEL_CONFIG, "ModelConfig.get_hidden_size", "self"),
    *_members(
        "vllm.config.parallel",
        "ParallelConfig",
        "_api_process_count data_parallel_external_lb data_parallel_hybrid_lb decode_context_parallel_size "
        "pipeline_parallel_size "
        "prefill_context_parallel_size tensor_parallel_size use_sequence_parallel_moe use_ubatching",
    ),
    VllmName("vllm.config.cache", "CacheConfig.kv_sharing_fast_prefill"),
    *_members("vllm.config.scheduler", "SchedulerConfig", "async_scheduling max_num_batched_tokens max_num_seqs"),
    VllmName("vllm.config.compilation", "CompilationConfig.cudagraph_capture_sizes"),
    *_members("vllm.config.speculative", "SpeculativeConfig", "method rejection_sample_method"),
    # Requests: the caller's parameters, and the objects that the front end makes from them.
    VllmName("vllm", "SamplingParams"),
    *_members(_SAMPLING, "SamplingParams", "extra_args max_tokens output_kind skip_reading_prefix_cache stop"),
    # process_inputs calls it too, so the result of steered() may share lists with its argument
    VllmName(_SAMPLING, "SamplingParams.clone", "self", contains="copy.deepcopy(self)"),
    VllmName(_SAMPLING, "RequestOutputKind"),
    VllmName(_SAMPLING, "RequestOutputKind.DELTA"),
    VllmName(_PROCESSOR, "InputProcessor"),
    *_members(_PROCESSOR, "InputProcessor", "model_config vllm_config"),
    VllmName(
        "vllm.v1.engine.parallel_sampling",
        "ParentRequest.get_child_info",
        contains="f'{index}_{self.request_id}'",
        needed_by="engine/worker/worker_steering.py",
    ),
    *_members(
        "vllm.v1.engine",
        "EngineCoreRequest",
        "cache_salt prompt_embeds prompt_token_ids request_id sampling_params",
    ),
    VllmName("vllm.exceptions", "GracefulHTTPError"),
    VllmName("vllm.exceptions", "VLLMClientError"),
    VllmName("vllm.exceptions", "GracefulHTTPError.__init__", "self, message, http_status"),
    # Prefix-cache keys.
    *(VllmName(module, "") for module in _HASH_HOLDERS),
    VllmName("vllm.v1.core.kv_cache_manager", "KVCacheManager"),
    VllmName("vllm.v1.request", "Request.num_tokens", needed_by="engine/prefix_cache.py"),
    VllmName("vllm.v1.request", "Request.sampling_params"),
    VllmName(
        "vllm.v1.request",
        "Request.get_skip_reading_prefix_cache",
        contains="self.sampling_params.skip_reading_prefix_cache",
        needed_by="engine/front/request_intake.py",
    ),
    # The offline front end.
    VllmName("vllm", "LLM"),
    VllmName("vllm.entrypoints.llm", "LLM.llm_engine"),
    VllmName("vllm.entrypoints.llm", "LLM.get_tokenizer", "self", needed_by="engine/front/extraction.py"),
    VllmName("vllm.tokenizers.protocol", "TokenizerLike.apply_chat_template", "self, messages, ..."),
    VllmName("vllm.entrypoints.llm", "LLM.collective_rpc", "self, method, ..., args="),
    *_members(_OFFLINE_ENGINE, "LLMEngine", "engine_core input_processor output_processor"),
    VllmName(_OFFLINE_ENGINE, "LLMEngine.has_unfinished_requests", "self"),
    VllmName(_OFFLINE_ENGINE, "LLMEngine.abort_request", "self, request_ids, internal="),
    VllmName("vllm.v1.engine.output_processor", "OutputProcessor.request_states"),
    VllmName("vllm.v1.engine.output_processor", "OutputProcessor.has_unfinished_requests", "self"),
    VllmName("vllm.v1.engine.output_processor", "OutputProcessor.propagate_error", "self, e"),
    VllmName(_CLIENT, "EngineCoreClient.shutdown", "self, ..."),
    VllmName("vllm.distributed", "cleanup_dist_env_and_memory", "..."),
    # The experiment at start-up.
    VllmName("vllm.distributed", "get_pp_group"),
    *_members("vllm.distributed.parallel_state", "GroupCoordinator", "is_first_rank is_last_rank"),
    VllmName("vllm.distributed", "get_tensor_model_parallel_world_size"),
    VllmName("vllm.distributed", "tensor_model_parallel_all_gather", "input_, dim="),
    VllmName(
        "vllm.forward_context", "set_forward_context", "attn_metadata, vllm_config, ..., num_tokens=, skip_compiled="
    ),
    VllmName("vllm.model_executor.layers.attention", "Attention"),
    VllmName("vllm.model_executor.layers.attention", "MLAAttention"),
    VllmName("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase"),
    VllmName(
        "vllm.model_executor.models.interfaces",
        "SupportsMultiModal.get_language_model",
        "self",
        needed_by="engine/worker/layer_experiment.py",
    ),
    VllmName("vllm.model_executor.models.utils", "PPMissingLayer"),
    VllmName("vllm.sequence", "IntermediateTensors.tensors"),
    VllmName("vllm.sequence", "IntermediateTensors"),
    VllmName(_MODEL_CONFIG, "ModelConfig.get_vocab_size", "self"),
    *_members(_MODEL_CONFIG, "ModelConfig", "max_model_len uses_mrope mrope_num_dims hf_config is_multimodal_model"),
    VllmName("vllm.v1.executor.uniproc_executor", "UniProcExecutor"),
    VllmName("vllm.v1.executor.abstract", "Executor.__init__", "self, vllm_config"),
    VllmName("vllm.v1.executor.abstract", "Executor.collective_rpc", "self, method, ..."),
    VllmName(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        "self, prompt_lora_mapping, token_lora_mapping, lora_requests, ...",
    ),
    VllmName("vllm", "RequestOutput"),
    *_members("vllm.outputs", "RequestOutput", "outputs prompt_token_ids request_id"),
    *_members("vllm.outputs", "CompletionOutput", "finish_reason index stop_reason token_ids"),
    # An engine core in a separate process.
    VllmName(_CLIENT, "MPClient"),
    *_members(_CLIENT, "MPClient", "resources utility_results vllm_config"),
    VllmName(_CLIENT, "SyncMPClient"),
    VllmName(_CLIENT, "SyncMPClient.outputs_queue"),
    *_members(_CLIENT, "BackgroundResources", "engine_dead engine_manager"),
    VllmName("vllm.v1.engine.utils", "CoreEngineProcManager.sentinels", "self"),
    VllmName(_CORE, "EngineCoreProc"),
    VllmName(_CORE, "DPEngineCoreProc"),
    VllmName(_CORE, "EngineCore.vllm_config"),
    VllmName("vllm.entrypoints.launchers.launcher", "terminate_if_errored", "server, engine"),
    VllmName("vllm.v1.engine.exceptions", "EngineDeadError"),
    # The asynchronous front end and the server.
    VllmName(_ASYNC, "AsyncLLM"),
    *_members(_ASYNC, "AsyncLLM", "input_processor output_handler output_processor vllm_config"),
    VllmName(_ASYNC, "AsyncLLM.abort", "async self, request_id, internal="),
    VllmName(_ASYNC, "AsyncLLM.collective_rpc", "async self, method, ..., args="),
    VllmName(_ASYNC, "AsyncLLM.is_sleeping", "async self"),
    VllmName(_ASYNC, "AsyncLLM.engine_core"),
    VllmName(_CLIENT, "AsyncMPClient"),
    VllmName(_CLIENT, "AsyncMPClient.call_utility_all_async", "async self, method, ..."),
    VllmName("vllm.entrypoints.launchers.api_server.app_state", "init_app_state.openai_serving_models"),
    VllmName(_SERVED_MODELS, "OpenAIServingModels.is_base_model", "self, model_name"),
    VllmName(_SERVED_MODELS, "OpenAIServingModels.lora_requests"),
    VllmName(_SERVED_MODELS, "OpenAIServingModels.model_name", "self, ..."),
    # The offline batch runner.
    VllmName(_BATCH_RUNNER, ""),
    VllmName(_BATCH_RUNNER, "BatchRequestInput.url"),
    VllmName(_CHAT_BODIES, "ChatCompletionRequest"),
    *_members(_CHAT_BODIES, "ChatCompletionRequest", "model n use_beam_search vllm_xargs"),
    VllmName(_CHAT_BODIES, "ChatCompletionResponse"),
    *_members("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "engine_client models"),
    VllmName("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    VllmName(_SERVE, "ServeSubcommand"),
    VllmName(_SERVE, "ServeSubcommand.subparser_init", "self, subparsers"),
    VllmName(_SERVE, "ServeSubcommand.validate", "self, args"),
    VllmName(_SERVE, "ServeSubcommand.cmd", "static args"),
    # The scheduler, and the step outputs that it receives.
    VllmName(_SCHEDULER, "Scheduler"),
    *_members(_SCHEDULER, "Scheduler", "kv_cache_manager requests running"),
    VllmName(_SCHEDULER, "Scheduler.finish_requests", "self, request_ids, finished_status"),
    *_members("vllm.v1.core.kv_cache_manager", "KVCacheManager", "block_pool kv_cache_config"),
    VllmName("vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", "self, block_ids"),
    VllmName("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", "self, request_id"),
    VllmName("vllm.v1.core.block_pool", "BlockPool.null_block"),
    VllmName("vllm.v1.core.kv_cache_utils", "KVCacheBlock.block_id"),
    VllmName("vllm.v1.kv_cache_interface", "KVCacheConfig.kv_cache_groups"),
    VllmName("vllm.v1.kv_cache_interface", "KVCacheGroupSpec.kv_cache_spec"),
    VllmName("vllm.v1.kv_cache_interface", "KVCacheSpec.block_size"),
    VllmName("vllm.v1.engine", "EngineCoreOutput"),
    VllmName("vllm.v1.engine", "EngineCoreOutputs"),
    VllmName("vllm.v1.engine", "EngineCoreOutputs.outputs"),
    VllmName("vllm.v1.engine", "FinishReason"),
    *_members("vllm.v1.engine", "FinishReason", "ERROR STOP"),
    VllmName("vllm.v1.request", "RequestStatus"),
    *_members("vllm.v1.request", "RequestStatus", "FINISHED_ERROR FINISHED_STOPPED"),
    *_members(
        "vllm.v1.request",
        "Request",
        "client_index drop_stale_output num_prompt_tokens num_stale_output_tokens request_id",
    ),
    VllmName("vllm.v1.request", "Request.is_finished", "self"),
    *_members("vllm.v1.outputs", "ModelRunnerOutput", "req_id_to_index sampled_token_ids"),
    VllmName("vllm.v1.outputs", "AsyncModelRunnerOutput"),
    VllmName("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", "self"),
    # Workers, and the scheduler outputs that their runners receive.
    VllmName(_WORKER, "WorkerBase"),
    *_members(_WORKER, "WorkerBase", "device model_runner parallel_config rank vllm_config"),
    VllmName(_WORKER, "WorkerBase.execute_model"),
    VllmName(_WORKER, "WorkerBase.sample_tokens"),
    *_members(
        _SCHEDULED,
        "SchedulerOutput",
        "finished_req_ids preempted_req_ids scheduled_new_reqs scheduled_spec_decode_tokens",
    ),
    *_members(_SCHEDULED, "NewRequestData", "req_id sampling_params"),
    # The classic runner.
    VllmName(_RUNNER, "GPUModelRunner"),
    *_members(_RUNNER, "GPUModelRunner", "device discard_request_mask input_batch vllm_config"),
    VllmName(_RUNNER, "GPUModelRunner.get_model", "self"),
    VllmName(_CPU_RUNNER, "CPUModelRunner"),
    VllmName(
        _RUNNER,
        "GPUModelRunner._update_states",
        contains="self._on_request_state_removed(req_id, req_state)",
        needed_by="engine/worker/patch_classic_runner.py",
    ),
    # LoRA on the CPU.
    VllmName(_CPU_LORA, "PunicaWrapperCPU"),
    VllmName("vllm.v1.sample.rejection_sampler", ""),
    VllmName("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.token_lora_indices"),
    VllmName("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.sampler_indices"),
    VllmName("vllm.v1.utils", "CpuGpuBuffer.np"),
    *_members(_BATCH, "InputBatch", "generators num_computed_tokens_cpu num_reqs req_ids"),
    # The V2 runner.
    VllmName(_STATES_V2, ""),
    VllmName(_STATE_V2, "ModelState"),
    VllmName(_STATE_V2, "ModelState.__init__", "self, vllm_config, model, encoder_cache, device"),
    VllmName(_STATE_V2, "ModelState.add_request", "self, req_index, new_req_data"),
    VllmName(_STATE_V2, "ModelState.prepare_inputs", "self, input_batch, req_states"),
    VllmName(_STATE_V2, "ModelState.prepare_dummy_inputs", "self, num_reqs, num_tokens"),
    VllmName(_RUNNER_V2, "GPUModelRunner"),
    VllmName(_RUNNER_V2, "GPUModelRunner.model_state"),
    *_members("vllm.v1.worker.gpu.input_batch", "InputBatch", "num_computed_tokens_np num_scheduled_tokens req_ids"),
    VllmName("vllm.v1.worker.gpu.states", "RequestState.req_id_to_index"),
)
