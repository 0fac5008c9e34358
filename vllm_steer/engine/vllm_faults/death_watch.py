"""Deaths of processes: whoever waits for one that has died is told, and what served it ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Callable
from multiprocessing import connection
from threading import Thread
from typing import Any

from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
from vllm.v1.engine.core_client import MPClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer.engine.patching import patch
from vllm_steer.settings import SteerSettings


def install() -> None:
    """Install the patches that watch for processes that die."""
    for one in (WATCH_ENGINE, WATCH_PARENT):
        one.install()


def _start_engine_core_monitor(original: Any) -> Any:
    def start_engine_core_monitor(self: Any) -> None:
        original(self)
        manager = self.resources.engine_manager
        if manager is not None and SteerSettings.of(self.vllm_config.additional_config) is not None:
            # No reference to the client, which ends its engine when it is collected.
            watched = (weakref.ref(self), manager.sentinels())
            Thread(target=_watch, args=watched, daemon=True, name="SteerDeathWatch").start()

    return start_engine_core_monitor


def _while_parent_lives(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run_busy_loop(self: Any) -> Any:
        parent = multiprocessing.parent_process()
        if parent is not None and SteerSettings.of(self.vllm_config.additional_config) is not None:
            Thread(target=_end_with, args=(parent.sentinel,), daemon=True, name="SteerParentWatch").start()
        return run(self)

    return run_busy_loop


def _end_with(parent: int) -> None:
    """End this process, an engine core, in vLLM's own way once its parent is gone; in an orderly end it goes first."""
    connection.wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)


def _watch(client_ref: weakref.ref[Any], sentinels: list[Any]) -> None:
    connection.wait(sentinels)
    is_over = False
    while not is_over:
        client = client_ref()
        if client is None:
            return
        # Until vLLM has marked the engine dead, more may be asked of it; what is asked is booked before the mark is
        # looked at, so the round after the mark misses nothing.
        is_over = client.resources.engine_dead
        _release(client)
        del client
        time.sleep(0.1)


def _release(client: Any) -> None:
    """Fail all that waits for the engine of ``client``; nothing does after an orderly shutdown."""
    for future in list(client.utility_results.values()):
        if isinstance(future, concurrent.futures.Future):
            _fail(future)
        elif not future.get_loop().is_closed():
            future.get_loop().call_soon_threadsafe(_fail, future)
    if isinstance(client, SyncMPClient) and client.resources.engine_dead:
        client.outputs_queue.put(EngineDeadError())


def _fail(future: concurrent.futures.Future[Any] | asyncio.Future[Any]) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError, asyncio.InvalidStateError):  # an answer just came
        future.set_exception(EngineDeadError())


WATCH_ENGINE = patch(
    MPClient,
    "start_engine_core_monitor",
    _start_engine_core_monitor,
    takes="self",
    why="Where the engine core's process is killed, vLLM 0.32 leaves LLM.generate and every RPC under way waiting "
    "for ever.",
    gone_when="vLLM fails what is pending when it finds its engine dead.",
)
WATCH_PARENT = patch(
    (EngineCoreProc, DPEngineCoreProc),
    "run_busy_loop",
    _while_parent_lives,
    takes="self",
    why="Where the front end's process is killed, vLLM 0.32 leaves the engine core and its workers running for ever, "
    "with all their memory.",
    gone_when="an engine core ends with its parent.",
)
