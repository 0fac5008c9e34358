"""vLLM's OpenAI-compatible server, in a process of its own, for as long as a block of code runs."""

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
    """The server ended, or was not healthy in time; the message ends with the end of its log."""


@dataclass(frozen=True)
class ApiServer:
    """A running server.

    Attributes:
        url: where it listens, without a path.
        process: its first process.
    """

    url: str
    process: psutil.Popen


@contextmanager
def running(arguments: Sequence[str], log: Path, **environment: str) -> Iterator[ApiServer]:
    """Start ``python`` with these arguments, which run a server, and give it when it is healthy; stop it at the end.

    The host 127.0.0.1 and a free port are added to the arguments, ``environment`` to this process's. All that it
    prints goes to ``log``. Raises ServerDidNotStart.
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
        except psutil.NoSuchProcess:  # it has ended by itself
            process.wait()
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def is_healthy(url: str) -> bool:
    """Whether the server at ``url`` answers and says that its engine is well."""
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
