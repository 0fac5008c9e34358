"""The only room that imports vLLM. Every place where it reaches into vLLM 0.32 is listed here.

Official extension points in use: ``vllm.general_plugins``, ``vllm.endpoint_plugins``, ``additional_config``,
``SamplingParams.extra_args``, ``cache_salt``, ``skip_reading_prefix_cache``, ``collective_rpc``, torch hooks.

Patches, each a wrapper that calls the original, each inert unless ``additional_config`` holds ``vllm_steer``:

``EngineArgs.create_engine_config``  (``config.py``; vllm/engine/arg_utils.py)
    Why: settings must be checked, and models and features refused, before any weight is loaded; the plugin's build must
    enter the compile cache's key. Gone when: vLLM lets a plugin validate the engine's configuration.
``InputProcessor.process_inputs``  (``requests.py``; vllm/v1/engine/input_processor.py)
    Why: the one place that every front end passes before a request is scheduled. Gone when: there is an admission hook.
``InputProcessor.assign_request_id``  (``requests.py``)
    Why: ready-made ``EngineCoreRequest`` objects do not pass ``process_inputs``, but they pass here; one that carries a
    spec nobody has checked would run unsteered. Gone when: vLLM drops that deprecated way in.
``LLM.beam_search``  (``requests.py``; vllm/entrypoints/llm.py)
    Why: it computes generated tokens again as prompts, which would steer them as such where an engine has a default.
    Gone when: beam search keeps a request's parameters and tells prompt from answer.
``Scheduler.update_from_output``  (``stream_overflow.py``; vllm/v1/core/sched/scheduler.py)
    Why: a request whose steered stream had to be cut off must end with an error, before its tokens are shown, and its
    blocks must leave the prefix cache. Gone when: a worker can fail one request.
    The worker hands those requests over with the output of the step: a float16 engine's worker object gets an
    ``execute_model`` and a ``sample_tokens`` of its own.
``kv_cache_utils.generate_block_hash_extra_keys``  (``prefix_cache.py``; vllm/v1/core/kv_cache_utils.py, by name in
    block_pool.py and simple_kv_offload/manager.py)
    Why: steering that starts at the first generated token must fork the block chain there; ``cache_salt`` can only fork
    it at block 0. Gone when: requests can carry per-position cache keys.
``GPUModelRunner.load_model``, ``CPUModelRunner.load_model``  (``runner_v1.py``; vllm/v1/worker/gpu_model_runner.py)
    Why: hooks go on after the weights are there and before the first (traced) call.
``GPUModelRunner._prepare_inputs``
    Why: the batch's order and token spans are final there, and nothing has run yet.
``GPUModelRunner._on_request_state_removed``
    Why: vLLM's own hook for platform runners that a request is finished; a plugin cannot subclass the runner.
``GPUModelRunner._dummy_run``
    Why: warm-up, profiling and graph capture must see an untouched token map.
``model_states.resolve_model_state_cls``  (``runner_v2.py``; vllm/v1/worker/gpu/model_states/__init__.py)
    Why: the V2 runner's extension point, ``ModelState``, is chosen by the model's class, which is vLLM's; whichever it
    chooses gets steering put before it. Gone when: a plugin can name a ``ModelState``.
``GPUModelRunner.finish_requests``  (V2; ``runner_v2.py``; vllm/v1/worker/gpu/model_runner.py)
    Why: ``ModelState.remove_request`` hears of finished, preempted and new requests alike. Gone when: it hears which.
``GPUModelRunner._bookkeeping_sync``  (CPU only; ``cpu_seeds.py``)
    Why: vLLM rewinds the generator of a seeded request whose prompt is not finished with ``set_offset``, which
    CPU generators do not have: the engine dies. Gone when: vLLM rewinds CPU generators.
``PunicaWrapperCPU.add_shrink``  (``cpu_lora.py``; vllm/lora/punica_wrapper/punica_cpu.py; with LoRA only)
``PunicaWrapperCPU.add_lora_embedding``
``PunicaWrapperCPU.add_lora_logits``
    Why: beside a request with an adapter, vLLM's CPU operations put the adapter of the last slot on one without: they
    index with its mark for "none", -1. Gone when: they leave such tokens alone (vLLM's pull requests 48421, 49656).
``MPClient.start_engine_core_monitor``  (``death_watch.py``; vllm/v1/engine/core_client.py)
    Why: where the engine core's process is killed, vLLM 0.32 leaves ``LLM.generate`` and every RPC that is under way
    waiting for ever. Gone when: vLLM fails what is pending when it finds its engine dead.
``EngineCoreProc.run_busy_loop``, ``DPEngineCoreProc.run_busy_loop``  (``death_watch.py``; vllm/v1/engine/core.py)
    Why: where the front end's process is killed, vLLM 0.32 leaves the engine core and its workers running for ever,
    with all their memory. Gone when: an engine core ends with its parent.
``AsyncLLM.generate``  (``async_readouts.py``; vllm/v1/engine/async_llm.py; where an engine is configured)
    Why: vLLM's server calls it for every engine request and shows its outputs to nobody else; a readout has to be
    collected between a sample's last token and the reply. Gone when: outputs can carry what a worker hands over.
``AsyncLLM.shutdown``  (``async_readouts.py``)
    Why: it cancels the task that hands out outputs before that has told the waiting requests that the engine is gone;
    they would wait for ever, and with them the server's own end. Gone when: shutdown tells them.
``run_batch.run_request``  (``batch_runner.py``; vllm/entrypoints/launchers/run_batch.py; in the batch runner only)
    Why: the lines of a batch file pass no middleware, and vLLM ignores the fields of a body that it does not know.
    Gone when: it does not.
``WorkerBase.__init__``, ``WorkerBase.vllm_steer_*``  (``worker_rpc.py``; vllm/v1/worker/worker_base.py)
    Why: the first worker of a configured engine installs the runner's patches; the methods are added, not patched, for
    ``collective_rpc`` to find. Gone when: plugins can add RPC methods without ``worker_extension_cls``.

The classic runner's patches go with that runner: the rest of what the V2 runner needs is in its ``ModelState``.
"""
