"""The plugin's log, as a part of vLLM's."""

from __future__ import annotations

from vllm.logger import init_logger

logger = init_logger("vllm.vllm_steer")  # vLLM configures the loggers under its own name
