"""A process that answers every line on its stdin with a line on its stdout, and does nothing in between.

Engines that were started differently live in such processes, so that they can take turns: one does its work while the
others wait, or all of them pause in theirs, many times a second, to let the next one go on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeVar

Answer = TypeVar("Answer")
Turns = Generator[None, None, Answer]
"""Work that yields wherever it pauses, and returns its answer."""
Pause = Callable[[], None]
"""Returns when it is this process's turn again."""
_READY, _PAUSED = "ready", "paused"
_SETTLING_SECONDS = 0.005
"""Before a process goes on: for as long, threads of the one before it may still be looking for work."""

ENGINE_ENVIRONMENT = {
    # The engine shares its process with nothing but the work: nothing else is timed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On a CPU vLLM 0.32 saves ahead-of-time compiled graphs that it cannot load (``compilation/decorators.py`` asks for
    # ``finalize_loading``, which only graphs of its own backend have), so it compiles at every start. Without them
    # PyTorch's own cache serves: the same graph is compiled once.
    "VLLM_USE_AOT_COMPILE": "0",
    # Which pages of 4 KiB a process happens to get decides for as long as it lives how well its weights go through the
    # caches: the next one of its kind can be 2 % slower. Pages of 2 MiB leave less to that.
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
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
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=os.environ | ENGINE_ENVIRONMENT | environment,
            )

    def wait(self) -> None:
        """Return once it is ready.

        Raises:
            ProcessDied: it did not start.
        """
        while self._answer() != _READY:  # before it: what libraries print while they are imported
            pass
        self.start_seconds = time.perf_counter() - self._began

    def turns(self, line: str = "") -> Turns[str]:
        """Its answer to a line, with the pauses that it makes on the way.

        Raises:
            ProcessDied: while at it.
        """
        assert self._process.stdin is not None
        while True:
            time.sleep(_SETTLING_SECONDS)
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            if answer != _PAUSED:
                return answer
            yield
            line = ""

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
        return line.removesuffix("\n")


def side_by_side(work: Mapping[str, Turns[Answer]]) -> dict[str, Answer]:
    """Let all go on in turn, from pause to pause, in this order; the answers."""
    answers: dict[str, Answer] = {}
    while len(answers) < len(work):
        for name, turns in work.items():
            if name in answers:
                continue
            try:
                next(turns)
            except StopIteration as ended:
                answers[name] = ended.value
    return answers


def serve(start: Callable[[Pause], Callable[[str], str]]) -> None:
    """The other side: start something that answers lines, say that it is ready, and answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer

    def pause() -> None:
        print(_PAUSED, file=answers, flush=True)
        sys.stdin.readline()

    answer = start(pause)
    print(_READY, file=answers, flush=True)
    for line in sys.stdin:
        print(answer(line), file=answers, flush=True)
