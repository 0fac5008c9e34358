"""A process that answers every line on its stdin with a line on its stdout, and is idle in between.

Engines with different settings live in such processes so that they can take turns: either one does all its work while
the others wait, or all of them pause many times a second to let the next one go on.
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
"""Work that yields at every pause and returns its answer."""
Pause = Callable[[], None]
"""Gives up this process's turn; returns when its next turn begins."""
_READY, _PAUSED = "ready", "paused"
_SETTLING_SECONDS = 0.005
"""Wait before a process goes on: threads of the process before it may spin for this long."""

ENGINE_ENVIRONMENT = {
    # The engine runs in the process that does the work, so that nothing else is timed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On a CPU vLLM 0.32 saves ahead-of-time compiled graphs that it cannot load (``compilation/decorators.py`` needs
    # ``finalize_loading``, which only graphs of its own backend have), so it compiles at every start. Without them
    # PyTorch's own cache is used, and the same graph is compiled once.
    "VLLM_USE_AOT_COMPILE": "0",
    # The 4 KiB pages that a process happens to get decide for its whole life how well its weights fit the caches: two
    # processes of a kind can differ in speed by 2 %. Pages of 2 MiB reduce this effect.
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class ProcessDied(Exception):
    """The process ended before it answered; the message is its output."""


class LineProcess:
    """A module of this package in its own process.

    Args:
        module: run as ``python -m MODULE``; it calls ``serve``.
        argument: its one command-line argument.
        environment: variables added to those of this process.
        log: file for its output.
        folder: working folder, whose packages it imports; None for that of this process.

    Attributes:
        start_seconds: seconds from its start until it was ready; set by ``wait``.
    """

    start_seconds: float

    def __init__(
        self, module: str, argument: str, environment: Mapping[str, str], log: Path, folder: Path | None = None
    ) -> None:
        self._log = log
        self._began = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, argument],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                cwd=folder,
                env={**os.environ, **ENGINE_ENVIRONMENT, **environment},
            )

    def wait(self) -> None:
        """Return once the process is ready.

        Raises:
            ProcessDied: it ended before it was ready.
        """
        while self._answer() != _READY:  # skips what libraries print on import
            pass
        self.start_seconds = time.perf_counter() - self._began

    def turns(self, line: str = "") -> Turns[str]:
        """Send a line, yield at every pause of the process, and return its answer.

        Raises:
            ProcessDied: the process ended before it answered.
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
        """End the process; kill it if it takes more than 60 s."""
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
    """Run all works in turn, from pause to pause, in the order of the mapping; return their answers."""
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
    """The side of the started process: call ``start``, report that it is ready, and answer lines until stdin ends.

    ``start`` gets the function to pause with, and returns the one that answers a line.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the output of libraries is no answer

    def pause() -> None:
        print(_PAUSED, file=answers, flush=True)
        sys.stdin.readline()

    answer = start(pause)
    print(_READY, file=answers, flush=True)
    for line in sys.stdin:
        print(answer(line), file=answers, flush=True)
