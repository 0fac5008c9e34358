"""Watches for dead processes: calls to a dead engine fail, and an engine ends when its parent has died."""

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
    """Install the patches that watch for dead processes."""
    for one in (WATCH_ENGINE, WATCH_PARENT):
        one.install()


def _start_engine_core_monitor(original: Any) -> Any:
    def start_engine_core_monitor(self: Any) -> None:
        original(self)
        manager = self.resources.engine_manager
        if manager is not None and SteerSettings.of(self.vllm_config.additional_config) is not None:
            # A weak reference: the client ends its engine when it is garbage-collected.
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
    """End this engine core with SIGTERM, as vLLM does, once its parent is dead; normally the core ends first."""
    connection.wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)


def _watch(client_ref: weakref.ref[Any], sentinels: list[Any]) -> None:
    connection.wait(sentinels)
    is_over = False
    while not is_over:
        client = client_ref()
        if client is None:
            return
        # New calls may come until vLLM has marked the engine dead. A call is recorded before it checks the mark, so a
        # release after the mark misses none.
        is_over = client.resources.engine_dead
        _release(client)
        del client
        time.sleep(0.1)


def _release(client: Any) -> None:
    """Fail all calls that wait for the engine of ``client``; there are none after an orderly shutdown."""
    for future in list(client.utility_results.values()):
        if isinstance(future, concurrent.futures.Future):
            _fail(future)
        elif not future.get_loop().is_closed():
            future.get_loop().call_soon_threadsafe(_fail, future)
    if isinstance(client, SyncMPClient) and client.resources.engine_dead:
        client.outputs_queue.put(EngineDeadError())


def _fail(future: concurrent.futures.Future[Any] | asyncio.Future[Any]) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError, asyncio.InvalidStateError):  # it was just answered
        future.set_exception(EngineDeadError())


WATCH_ENGINE = patch(
    MPClient,
    "start_engine_core_monitor",
    _start_engine_core_monitor,
    takes="self",
    why="When the engine core's process is killed, LLM.generate and all pending RPCs of vLLM 0.32 wait for ever.",
    gone_when="vLLM fails pending calls when it finds its engine dead.",
)
WATCH_PARENT = patch(
    (EngineCoreProc, DPEngineCoreProc),
    "run_busy_loop",
    _while_parent_lives,
    takes="self",
    why="When the front end's process is killed, the engine core of vLLM 0.32 and its workers run for ever and keep "
    "all their memory.",
    gone_when="an engine core ends with its parent.",
)
