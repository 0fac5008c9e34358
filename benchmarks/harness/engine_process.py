"""An engine in its own process, and the work that it is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.line_process import LineProcess, Turns, side_by_side

COMPILED_WITH: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 256}
"""Engine arguments that the compiled graph depends on. Benchmarks with the same ones share a compiled graph."""
PLUGIN = "vllm_steer"


@dataclass(frozen=True)
class Work:
    """Requests that an engine gets all at once.

    Attributes:
        kind: kind of each request: "plain", "steered", "stacked", "prompt read" or "read" (see ``overhead.engine``).
        requests: number of requests.
        prompt_tokens: tokens of each prompt.
        max_tokens: tokens that each request generates, neither more nor fewer.
        pauses: whether to pause before every step of the engine. Pauses are not timed.
    """

    kind: str
    requests: int
    prompt_tokens: int
    max_tokens: int
    pauses: bool = False


@dataclass(frozen=True)
class Took:
    """Time and memory of a piece of work.

    Attributes:
        laps: seconds from pause to pause, from before the requests are built until all outputs and readouts are
            collected. With a pause at every step, the first lap is admission, and the last one includes collecting the
            readouts.
        first_token: seconds from a request's arrival to its first token, median over the requests.
        inter_token: seconds between a request's tokens, mean of a request, median over the requests; 0.0 if one token
            was generated.
        tokens: digest of all generated tokens.
        memory_gib: memory of the process: "resident" (now), "peak" (since its start), and on a GPU the peaks of the
            memory that PyTorch "allocated" and "reserved" there.
    """

    laps: list[float]
    first_token: float
    inter_token: float
    tokens: str
    memory_gib: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of all laps."""
        return sum(self.laps)


class EngineProcess:
    """An engine in its own process, which waits for work. It is ready after ``wait``.

    ``wait``, ``do`` and ``turns`` raise ``ProcessDied`` if the process has ended.

    Args:
        layers: decoder blocks to hook; None leaves steering unconfigured.
        plugin: whether vLLM loads the plugin.
        engine_args: passed to ``vllm.LLM``.
        log: file for the output of the process.
        folder: a clone of this repository whose packages the process imports; None for the one of this process.
    """

    def __init__(
        self,
        layers: Sequence[int] | None,
        plugin: bool,
        engine_args: Mapping[str, Any],
        log: Path,
        folder: Path | None = None,
    ) -> None:
        settings = json.dumps({"layers": layers, "engine_args": dict(engine_args)})
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_PLUGINS": PLUGIN if plugin else ""}
        self._process = LineProcess("benchmarks.overhead.engine", settings, environment, log, folder)

    @property
    def start_seconds(self) -> float:
        """Seconds from the start of the process until the engine was ready."""
        return self._process.start_seconds

    def wait(self) -> EngineProcess:
        """Return this engine once it is ready."""
        self._process.wait()
        return self

    def do(self, work: Work) -> Took:
        """Do the work to its end, through all pauses."""
        return side_by_side({"": self.turns(work)})[""]

    def turns(self, work: Work) -> Turns[Took]:
        """Do the work, yielding at every pause; see ``side_by_side``."""
        answer = yield from self._process.turns(json.dumps(asdict(work)))
        return Took(**json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._process.close()
