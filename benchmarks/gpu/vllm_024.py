"""Lets the benchmarks steer on vLLM 0.24, the newest release built for PyTorch 2.11, on machines where no other runs.

The plugin rightly refuses this release: no test runs on it, and its server has no endpoint plugins, so it would steer
nothing. This module adds, before the plugin is loaded, the names of later releases that the offline API needs: enough
for an in-process engine on the classic runner. ``hooks.bench`` compares its results with hooks before it measures, and
``overhead.bench`` stops if steering changes no token.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_steer.engine import vllm_versions

RELEASE = "0.24"
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""For all engines on that release, also those without the plugin, so that all use the same runner."""


def is_here() -> bool:
    """Whether vLLM 0.24 is installed."""
    return vllm_versions.minor(vllm_versions.vllm_version()) == RELEASE


def install() -> None:
    """Add the missing names, on vLLM 0.24 only. Call it once, before an engine starts."""
    if not is_here():
        return
    from vllm import exceptions
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.simple_kv_offload import manager
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    exceptions.GracefulHTTPError = _RefusalWithStatus
    manager.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys
    GPUModelRunner._on_request_state_removed = lambda self, req_id, req_state: None
    GPUModelRunner._update_states = _update_states(GPUModelRunner._update_states)
    vllm_versions.SUPPORTED[RELEASE] = "made to run for benchmarks"


class _RefusalWithStatus(Exception):
    def __init__(self, message: str, http_status: Any) -> None:
        super().__init__(message)
        self.message, self.http_status = message, http_status


def _update_states(original: Any) -> Any:
    @functools.wraps(original)
    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for req_id in scheduler_output.finished_req_ids:
            self._on_request_state_removed(req_id, self.requests.get(req_id))
        return original(self, scheduler_output, *args, **kwargs)

    return _update_states


def pytest_configure() -> None:
    """Hook of the pytest plugin (``-p benchmarks.gpu.vllm_024``): lets the tests' engines steer on that release."""
    install()
