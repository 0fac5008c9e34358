"""Entry point of ``vllm.general_plugins``: runs in every vLLM process, before configuration and before workers.

The one module that knows both the engine and the server.
"""

from __future__ import annotations


def register() -> None:
    """Install the patches that every process needs (``docs/patches.md`` lists all). vLLM calls it once in each process.

    With a vLLM that is not supported, or with ``VLLM_STEER_DISABLE=1``, engines that ask for steering are refused when
    they start, and all others run as if the plugin were not installed.
    """
    from vllm_steer.engine import config, supported

    config.install()
    config.prepare_batch_runner(_install_batch_runner)
    if supported.unsupported_reason() is None:
        from vllm_steer.engine import prefix_cache, stream_overflow
        from vllm_steer.engine.front import requests
        from vllm_steer.engine.vllm_faults import death_watch
        from vllm_steer.engine.worker import worker_rpc

        # The runner's patches follow from worker_rpc, in worker processes of engines that are configured for steering.
        for module in (requests, prefix_cache, worker_rpc, death_watch, stream_overflow):
            module.install()
    supported.note_loaded()


def _install_batch_runner() -> None:
    from vllm_steer.server import batch_runner  # it imports most of vLLM's server

    batch_runner.install()
