"""Engines in processes of their own, of which only the one that is asked to work does; the others wait for a line.

They take turns on one machine, so that engines that were started differently are compared within seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPILED_WITH: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 256}
"""Engine arguments that vLLM's compile cache goes by: with the same ones, and the same plugins, a benchmark finds the
graph that another has compiled."""
PLUGIN = "vllm_steer"


class EngineProcessDied(Exception):
    """The process of an engine ended; the message ends with the end of its log."""


@dataclass(frozen=True)
class Work:
    """Requests that are handed to an engine all at once.

    Attributes:
        kind: what each asks: "plain", "steered", "stacked", "prompt read" or "read" (see ``overhead_engine``).
        requests: how many.
        prompt_tokens, max_tokens: of each; as many as ``max_tokens`` are generated.
    """

    kind: str
    requests: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Took:
    """What a piece of work took.

    Attributes:
        seconds: from before the requests were built until all outputs and readouts were there.
        first_token: seconds from a request's arrival to its first token, the median over the requests.
        inter_token: seconds from one of its tokens to the next, the mean of a request, the median over the requests;
            0.0 where one token was generated.
        tokens: digest of all generated tokens.
        memory_gib: of the process since it started; "resident" (now), "peak", and on a GPU the peaks of what PyTorch
            had "allocated" and "reserved" there.
    """

    seconds: float
    first_token: float
    inter_token: float
    tokens: str
    memory_gib: dict[str, float]


class EngineProcess:
    """An engine that waits for work, in a process of its own; it is ready for it behind ``wait``.

    Args:
        layers: decoder blocks to hook; None leaves steering unconfigured.
        plugins: what vLLM may load, its ``VLLM_PLUGINS``.
        engine_args: passed to ``vllm.LLM``.
        log: all that the process prints goes there.

    Attributes:
        start_seconds: from the start of the process until the engine was ready.
    """

    start_seconds: float

    def __init__(self, layers: Sequence[int] | None, plugins: str, engine_args: Mapping[str, Any], log: Path) -> None:
        settings = json.dumps({"layers": layers, "engine_args": dict(engine_args)})
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ, "VLLM_PLUGINS": plugins}
        self._log = log
        self._began = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.overhead_engine", settings],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # nothing but the engine is timed
            )  # fmt: skip

    def wait(self) -> EngineProcess:
        """Give the engine once it is ready.

        Raises:
            EngineProcessDied: it did not start.
        """
        self._answer()
        self.start_seconds = time.perf_counter() - self._began
        return self

    def do(self, work: Work) -> Took:
        """
        Raises:
            EngineProcessDied: while at it.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        return Took(**self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise EngineProcessDied(self._log.read_text(errors="replace")[-4000:])
        answer: dict[str, Any] = json.loads(line)
        return answer
