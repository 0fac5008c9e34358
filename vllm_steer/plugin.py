"""Entry point of ``vllm.general_plugins``: runs in every vLLM process, before configuration and before workers.

The one module that knows both the engine and the server.
"""

from __future__ import annotations


def register() -> None:
    """Install the patches that every process needs (``docs/patches.md`` lists all). vLLM calls it once in each process.

    With a vLLM that is not supported, or with ``VLLM_STEER_DISABLE=1``, engines that ask for steering are refused when
    they start, and all others run as if the plugin were not installed.
    """
    from vllm_steer.engine import startup_checks, vllm_versions

    startup_checks.install()
    startup_checks.prepare_batch_runner(_install_batch_runner)
    if vllm_versions.unsupported_reason() is None:
        from vllm_steer.engine import early_ends, prefix_cache
        from vllm_steer.engine.front import request_intake
        from vllm_steer.engine.vllm_faults import death_watch
        from vllm_steer.engine.worker import rpc

        # ``rpc`` installs the patches of the runner, in worker processes of engines that are configured for steering.
        for module in (request_intake, prefix_cache, rpc, death_watch, early_ends):
            module.install()
    vllm_versions.note_loaded()


def _install_batch_runner() -> None:
    from vllm_steer.server import batch_runner  # it imports most of vLLM's server

    batch_runner.install()
