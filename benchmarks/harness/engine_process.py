"""An engine in a process of its own, and what it is asked to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.line_process import LineProcess, Turns, side_by_side

COMPILED_WITH: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 256}
"""Engine arguments that the compiled graph depends on: with the same ones, a benchmark finds the graph that another has
compiled."""
PLUGIN = "vllm_steer"


@dataclass(frozen=True)
class Work:
    """Requests that are handed to an engine all at once.

    Attributes:
        kind: what each asks: "plain", "steered", "stacked", "prompt read" or "read" (see ``overhead_engine``).
        requests: how many.
        prompt_tokens, max_tokens: of each; as many as ``max_tokens`` are generated.
        pauses: whether it pauses before every step of the engine. Such pauses count nowhere.
    """

    kind: str
    requests: int
    prompt_tokens: int
    max_tokens: int
    pauses: bool = False


@dataclass(frozen=True)
class Took:
    """What a piece of work took.

    Attributes:
        laps: seconds from pause to pause, from before the requests were built until all outputs and readouts were
            there; where it pauses at every step, the first one is admission, and the last one has the readouts'
            collection in it.
        first_token: seconds from a request's arrival to its first token, the median over the requests.
        inter_token: seconds from one of its tokens to the next, the mean of a request, the median over the requests;
            0.0 where one token was generated.
        tokens: digest of all generated tokens.
        memory_gib: of the process since it started; "resident" (now), "peak", and on a GPU the peaks of what PyTorch
            had "allocated" and "reserved" there.
    """

    laps: list[float]
    first_token: float
    inter_token: float
    tokens: str
    memory_gib: dict[str, float]

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.laps)


class EngineProcess:
    """An engine that waits for work; it is ready for it behind ``wait``. All raise ``ProcessDied`` where it ended.

    Args:
        layers: decoder blocks to hook; None leaves steering unconfigured.
        plugin: whether vLLM loads the plugin.
        engine_args: passed to ``vllm.LLM``.
        log: all that the process prints goes there.
    """

    def __init__(self, layers: Sequence[int] | None, plugin: bool, engine_args: Mapping[str, Any], log: Path) -> None:
        settings = json.dumps({"layers": layers, "engine_args": dict(engine_args)})
        environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_PLUGINS": PLUGIN if plugin else ""}
        self._process = LineProcess("overhead_engine", settings, environment, log)

    @property
    def start_seconds(self) -> float:
        """From the start of the process until the engine was ready."""
        return self._process.start_seconds

    def wait(self) -> EngineProcess:
        """Give the engine once it is ready."""
        self._process.wait()
        return self

    def do(self, work: Work) -> Took:
        """Give it work, and wait for the end of it."""
        return side_by_side({"": self.turns(work)})[""]

    def turns(self, work: Work) -> Turns[Took]:
        """Give it work, with the pauses that are asked for."""
        answer = yield from self._process.turns(json.dumps(asdict(work)))
        return Took(**json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._process.close()
