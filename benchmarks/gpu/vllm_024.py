"""Lets the benchmarks steer beside vLLM 0.24, the newest release that is built for PyTorch 2.11, where no other runs.

The plugin refuses this release, rightly for its users: no test runs on it, and its server knows no endpoint plugins, so
it would steer nothing. What the offline API takes of later releases and this one lacks is put there before the plugin
is loaded: enough for an engine within its process, on the classic runner. What it computes is compared with hooks by
``hooks.bench`` before that measures, and ``overhead.bench`` ends where steering changes no token.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_steer.engine import supported

RELEASE = "0.24"
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
"""For engines beside that release, those without the plugin too: the same runner for all."""


def is_here() -> bool:
    """Whether that is the vLLM which is installed."""
    return supported.minor(supported.vllm_version()) == RELEASE


def install() -> None:
    """Put there what is missing, beside that release only. Call it once, before an engine starts."""
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
    supported.SUPPORTED[RELEASE] = "made to run for benchmarks"


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
    """As a plugin of pytest (``-p benchmarks.gpu.vllm_024``): the tests' engines steer beside that release too."""
    install()
