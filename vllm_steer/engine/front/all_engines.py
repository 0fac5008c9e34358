"""Calls to the workers of all engines behind an asynchronous front end: data parallelism runs several engines."""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient


async def call_workers(engine: AsyncLLM, method: str, *args: Any) -> list[list[Any]]:
    """Call a method of the workers, between two steps of each engine.

    Args:
        engine: the front end.
        method: its name for ``collective_rpc``.
        *args: its arguments, of plain types.

    Returns:
        For each engine, the answers of its workers in rank order. ``AsyncLLM.collective_rpc`` returns those of the
        first engine only (vllm/v1/engine/core_client.py, ``DPLBAsyncMPClient.call_utility_async``, 0.32.0).
    """
    client = engine.engine_core
    if isinstance(client, AsyncMPClient):
        answers: list[list[Any]] = await client.call_utility_all_async("collective_rpc", method, None, args, None)
        return answers
    return [await engine.collective_rpc(method, args=args)]
