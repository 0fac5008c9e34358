"""vLLM's OpenAI-compatible server, in its own process, while a block of code runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS = 600.0


class ServerDidNotStart(Exception):
    """The server ended, or was not healthy in time; the message is the end of its log."""


@dataclass(frozen=True)
class ApiServer:
    """A running server.

    Attributes:
        url: its address, without a path.
        process: its main process.
    """

    url: str
    process: psutil.Popen


@contextmanager
def running(arguments: Sequence[str], log: Path, **environment: str) -> Iterator[ApiServer]:
    """Start a server as ``python ARGUMENTS``, yield it once it is healthy, and stop it at the end.

    The arguments get the host 127.0.0.1 and a free port. ``environment`` is added to this process's variables. The
    server's output goes to ``log``.

    Raises:
        ServerDidNotStart: it ended, or was not healthy within START_SECONDS.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerDidNotStart(log.read_text(errors="replace")[-4000:])
            time.sleep(0.5)
        yield ApiServer(url, process)
    finally:
        try:
            process.terminate()
            process.wait(60)
        except psutil.NoSuchProcess:  # it has already ended
            process.wait()
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def is_healthy(url: str) -> bool:
    """Whether the server at ``url`` answers and reports that its engine is healthy."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
