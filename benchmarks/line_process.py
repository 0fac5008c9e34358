"""A process that answers every line on its stdin with a line on its stdout, and does nothing in between.

Engines that were started differently live in such processes, so that they can take turns within seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENGINE_ENVIRONMENT = {
    # The engine shares its process with nothing but the work: nothing else is timed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On a CPU vLLM 0.32 saves ahead-of-time compiled graphs that it cannot load (``compilation/decorators.py`` asks for
    # ``finalize_loading``, which only graphs of its own backend have), so it compiles at every start. Without them
    # PyTorch's own cache serves: the same graph is compiled once.
    "VLLM_USE_AOT_COMPILE": "0",
}


class ProcessDied(Exception):
    """The process ended before it had answered; the message is all that it had printed."""


class LineProcess:
    """A module of this package in a process of its own.

    Args:
        module: run as ``python -m benchmarks.MODULE``; it calls ``serve``.
        argument: handed to it.
        environment: added to this process's own.
        log: all that it prints goes there.

    Attributes:
        start_seconds: from its start until it was ready.
    """

    start_seconds: float

    def __init__(self, module: str, argument: str, environment: dict[str, str], log: Path) -> None:
        self._log = log
        self._began = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", argument],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                env=os.environ | ENGINE_ENVIRONMENT | environment,
            )  # fmt: skip

    def wait(self) -> None:
        """Return once it is ready.

        Raises:
            ProcessDied: it did not start.
        """
        self._answer()
        self.start_seconds = time.perf_counter() - self._began

    def ask(self, line: str = "") -> str:
        """Its answer to a line.

        Raises:
            ProcessDied: while at it.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ProcessDied(self._log.read_text(errors="replace"))
        return line


def serve(start: Callable[[], Callable[[str], str]]) -> None:
    """The other side: start something that answers lines, say that it is ready, and answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    answer = start()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(answer(line), file=answers, flush=True)
