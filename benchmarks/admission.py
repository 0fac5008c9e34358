"""What a steered or read request costs the host beyond a plain one, stage by stage, from `steered()` to its removal.

    python -m benchmarks.admission [--small] [--out FILE]

One engine in this process, with all layers of the demo model hooked, whose own objects do the work: its input
processor, its worker's steering and vLLM's serialisation. The engine makes no step: the stages are called one after
the other, each for --requests requests in a row, and no forward pass runs. Each request has its own α; those named
"each time others" have their own layers and orders of directions, too. Where plain vLLM
does something too, the stage is the difference to a plain request within the same round. Times are the CPU time of the
thread.

The sum over all stages counts what an engine with a process of its own and worker processes does. An engine within the
caller's process sends nothing, and one with a single worker does not pickle.
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that front end and worker can be called here
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.rounds import interval
from vllm_steer import Direction, Readout, Steering, register_directions, steer_config, steered
from vllm_steer.engine.front.admission import admission_of
from vllm_steer.engine.front.offline import _Wanted
from vllm_steer.engine.front.request_intake import _admit, asked_of, said_by
from vllm_steer.engine.prefix_cache import fork_key
from vllm_steer.engine.worker import rpc

NUM_LAYERS, FIVE_LAYERS, NUM_DIRECTIONS = 30, [8, 12, 16, 20, 24], 8
PROMPT_TOKENS, GENERATED_TOKENS, BLOCK_SIZE = 64, 16, 32
GOALS = ("1 entry", "40 entries")
"""Requests of which the record holds the measurements of every round."""
ADMISSION = ("steered()", "parsing", "admission")
"""The stages from the caller's list of entries to the admitted request."""


@dataclass(frozen=True)
class Kind:
    """What a request asks for.

    Attributes:
        name: the request in words.
        layers: where it is steered, by each direction.
        directions: number of directions at each of these layers.
        readout: what is read.
        is_new: whether layers and the order of directions are each request's own, so that nothing is remembered.
    """

    name: str
    layers: Sequence[int] = ()
    directions: int = 0
    readout: Readout | None = None
    is_new: bool = False

    def entries(self, rng: np.random.Generator) -> list[Steering]:
        """Entries with α of their own."""
        layers = rng.choice(NUM_LAYERS, len(self.layers), replace=False).tolist() if self.is_new else self.layers
        order = rng.permutation if self.is_new else np.arange
        places = [(layer, number) for layer in layers for number in order(self.directions).tolist()]
        alphas = rng.uniform(0.5, 1.5, len(places)).tolist()
        return [
            Steering(f"direction-{number}", alpha, layer=layer)
            for (layer, number), alpha in zip(places, alphas, strict=True)
        ]


KINDS = (
    Kind("1 entry", FIVE_LAYERS[:1], 1),
    Kind("40 entries", FIVE_LAYERS, NUM_DIRECTIONS),
    Kind("40 entries, each time others", FIVE_LAYERS, NUM_DIRECTIONS, is_new=True),
    Kind("readout of 5 layers", readout=Readout(FIVE_LAYERS, "prompt")),
    Kind("readout of 30 layers", readout=Readout(range(NUM_LAYERS), "prompt")),
)
PLAIN = Kind("plain")


class Host:
    """The parts of an engine that handle requests, called one after the other.

    Args:
        llm: the engine, in this process.
        num_requests: requests in a row of each stage.
    """

    def __init__(self, llm: LLM, num_requests: int) -> None:
        self.num_requests = num_requests
        self._processor = llm.llm_engine.input_processor
        self._admission = admission_of(self._processor)
        self._worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self._steering = self._worker.model_runner.vllm_steer
        self._rng = np.random.default_rng(0)
        self._params = SamplingParams(temperature=0.0, max_tokens=GENERATED_TOKENS)
        self._prompt = self._rng.integers(100, 10_000, PROMPT_TOKENS).tolist()
        self._count = 0

    def microseconds(self, kind: Kind) -> dict[str, float]:
        """CPU microseconds of each stage, per request."""
        found: dict[str, float] = {}

        def timed(stage: str, work: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
            rows = list(zip(*columns, strict=True))
            began = time.thread_time()
            made = [work(*row) for row in rows]
            found[stage] = (time.thread_time() - began) / len(rows) * 1e6
            return made

        entries = [kind.entries(self._rng) for _ in range(self.num_requests)]
        if kind is PLAIN:
            params = [copy(self._params) for _ in entries]
        else:
            params = timed("steered()", lambda own: steered(self._params, own, kind.readout), entries)
            asked = timed("parsing", lambda one: asked_of(self._processor, said_by(one)), params)
        params = timed("copying the parameters", deepcopy, params)
        requests = [self._request(one) for one in params]
        if kind is not PLAIN:
            timed("admission", lambda one, request: _admit(self._admission, one, request), asked, requests)
            timed("keys of KV blocks", self._block_keys, requests)
        encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreRequest)
        sent = timed("to the engine's process", encoder.encode, requests)
        requests = timed("from the front end", decoder.decode, sent)
        sent = timed("to a worker's process", _pickled, [one.sampling_params for one in requests])
        params = timed("from the engine", pickle.loads, sent)
        ids = [one.request_id for one in requests]
        internal = [f"{one}-0abc" for one in ids]
        timed("beginning, on the worker", self._steering.begin, internal, params)
        self._steering.prepare([], [], [], {})  # takes up that others have gone
        timed("first step's tables", self._first_step, internal)
        timed("removal", self._steering.finish, internal)
        if kind.readout is not None:
            timed("collection", self._collect, ids)
        return found

    def _request(self, params: SamplingParams) -> EngineCoreRequest:
        """A request as vLLM makes it of a prompt."""
        self._count += 1
        return EngineCoreRequest(
            request_id=str(self._count), prompt_token_ids=self._prompt, mm_features=None, sampling_params=params,
            pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip

    def _block_keys(self, request: EngineCoreRequest) -> None:
        for start in range(0, PROMPT_TOKENS + GENERATED_TOKENS, BLOCK_SIZE):
            fork_key(request, start, start + BLOCK_SIZE)

    def _first_step(self, request_id: str) -> None:
        self._steering.prepare([request_id], [0], [PROMPT_TOKENS], {})

    def _collect(self, request_id: str) -> None:
        sample = CompletionOutput(0, "", [0] * GENERATED_TOKENS, None, None, finish_reason="length")
        output = RequestOutput(request_id, None, self._prompt, None, [sample], finished=True)
        wanted = _Wanted.of(self._admission.asked, [output])
        ((read,),) = wanted.results([[rpc.collect(self._worker, wanted.samples)]])
        assert read is not None
        assert read.num_tokens == PROMPT_TOKENS


def _pickled(params: SamplingParams) -> bytes:
    return pickle.dumps(params, protocol=pickle.HIGHEST_PROTOCOL)


def beyond_plain(own: Mapping[str, float], plain: Mapping[str, float]) -> dict[str, float]:
    """What each stage takes beyond that of a plain request, and three sums."""
    stages = {name: value - plain.get(name, 0.0) for name, value in own.items()}
    return stages | {
        "from entries to admitted": sum(stages[name] for name in ADMISSION),
        "all": sum(stages.values()),
    }


def main() -> None:
    """Measure all kinds of requests in turn, print their stages, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer rounds")
    parser.add_argument("--model", type=Path, default=None, help="folder of a checkpoint; default: the demo model")
    parser.add_argument("--requests", type=int, default=40, help="in a row of each stage")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    if parser.parse_known_args()[0].small:
        parser.set_defaults(rounds=15)
    arguments = parser.parse_args()
    model = arguments.model or demo_model_path()
    llm = LLM(
        str(model), enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 28, block_size=BLOCK_SIZE,
        additional_config=steer_config(layers=range(NUM_LAYERS)),
    )  # fmt: skip
    vectors = np.random.default_rng(0).standard_normal((NUM_DIRECTIONS, llm.llm_engine.model_config.get_hidden_size()))
    register_directions(
        llm, [Direction(f"direction-{number}", 0, vector).normalised() for number, vector in enumerate(vectors)]
    )
    host = Host(llm, arguments.requests)
    ways = (PLAIN, *KINDS)
    for kind in ways:  # warms up
        host.microseconds(kind)
    gc.collect()
    gc.freeze()  # as vLLM's servers and engine processes do
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds):
        here = {kind.name: host.microseconds(kind) for kind in (ways if number % 2 else reversed(ways))}
        rounds.append({kind.name: beyond_plain(here[kind.name], here[PLAIN.name]) for kind in KINDS})
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in KINDS:
        stages: dict[str, dict[str, Any]] = {}
        print(f"\n{kind.name}")
        for stage in rounds[0][kind.name]:
            values = [one[kind.name][stage] for one in rounds]
            low, high = interval(values)
            stages[stage] = {"microseconds": statistics.median(values), "interval": [low, high]}
            print(f"  {stage:28} {statistics.median(values):8.1f} µs   ({low:.1f} - {high:.1f})")
        measured[kind.name] = stages
    goals = {
        f"{name}, {stage}": [one[name][stage] for one in rounds]
        for name in GOALS
        for stage in ("admission", "from entries to admitted", "all")
    }
    if arguments.out is not None:
        record.write(
            arguments.out,
            {"goals": goals, "stages": measured},
            requests=arguments.requests, rounds=arguments.rounds, model=model.name,
        )  # fmt: skip


if __name__ == "__main__":
    main()
