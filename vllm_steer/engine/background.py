"""Event-loop tasks that run without being awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from typing import Any

from vllm_steer.engine.log import logger


def run_in_background(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """Start a task on the running loop; if it fails, log the error as a warning."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(functools.partial(_tell, name))
    return task


def _tell(name: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("%s has ended: %s", name, error)
