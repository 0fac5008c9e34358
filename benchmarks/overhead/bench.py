"""The cost of the plugin: engines that have it, idle, steering and reading, against plain vLLM.

    python -m benchmarks.overhead.bench [--small] [--out FILE]

Every engine runs in its own process, and only one works at a time. A round compares each way with plain vLLM: both get
the same prompts and take turns, one engine step at a time, so that a slow second of the machine slows both. With
--turns call each does all its work in one turn: use it on a GPU, which works on while its process pauses. An engine can
be slower than the next one of its kind for its whole life, so all engines are started --starts times.

Throughput counts generated tokens over the time of the whole call: building the requests, prefill, decoding, and
collecting the readouts. Prefill throughput counts the prompt tokens of requests that generate one token.

Prefix caching is off for all: a way that repeats its prompts would measure the cache, which readouts may not read. The
way "absent again", another plain engine, shows the machine's noise where there is no difference.

On a GPU, several engines share its memory: choose the ways, and so the engines, with --ways, and the KV memory of each
with --kv-gib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.engine_process import COMPILED_WITH, EngineProcess, Took, Work
from benchmarks.harness.fastest_dtype import fastest_dtype
from benchmarks.harness.line_process import side_by_side
from benchmarks.harness.rounds import Figure, figures, figures_of_starts, interval


@dataclass(frozen=True)
class Way:
    """A kind of work (see ``overhead.engine``), and the name of the engine that does it."""

    engine: str
    kind: str


BASELINE = "absent"
WAYS = {
    BASELINE: Way("absent", "plain"),
    "absent again": Way("absent again", "plain"),
    "installed": Way("installed", "plain"),
    "idle": Way("hooked", "plain"),
    "idle, all layers": Way("all hooked", "plain"),
    "steered": Way("hooked", "steered"),
    "stacked": Way("hooked", "stacked"),
    "prompt read": Way("hooked", "prompt read"),
    "read": Way("hooked", "read"),
    "read, all layers": Way("all hooked", "read"),
}
SMALL = {
    "ways": [BASELINE, "installed", "idle", "steered", "prompt read"],
    "batches": [64],
    "rounds": [7],
    "prefill_batches": [8],
    "prefill_rounds": 3,
    "tokens": 1024,
    "starts": 1,
    "together": True,
}
MAX_TOKENS = (8, 64)
SAME_GRAPH = ("absent again", "installed")
"""Engines that use the graph that the engine "absent" has compiled."""


def parse() -> argparse.Namespace:
    """The command line's arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer ways, batches and rounds")
    parser.add_argument("--model", type=Path, default=None, help="folder of a checkpoint; default: the demo model")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, and no tokenizer is needed")
    parser.add_argument("--dtype", default=fastest_dtype(), help="default: bfloat16, on a CPU with AVX2 alone float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 12, 16, 20, 24], help="hooked in most engines")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256], help="requests at once")
    parser.add_argument("--rounds", type=int, nargs="+", default=[2, 2, 5, 2], help="of each batch, after each start")
    parser.add_argument("--prefill-batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prefill-rounds", type=int, default=5)
    parser.add_argument("--turns", choices=["step", "call"], default="step", help="how often two ways take turns")
    parser.add_argument("--tokens", type=int, default=2048, help="generated in a call, within 8 to 64 a request")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--prefill-tokens", type=int, default=256, help="of a prompt where prefill is measured")
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV memory of each engine")
    parser.add_argument("--starts", type=int, default=8, help="starts of all engines; the last start-up is timed")
    parser.add_argument("--fill-cache", action="store_true", help="start all once beforehand, to compile their graphs")
    parser.add_argument("--together", action="store_true", help="start engines at once; the starts are not timed")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    if parser.parse_known_args()[0].small:
        parser.set_defaults(**SMALL)
    arguments = parser.parse_args()
    if len(arguments.rounds) != len(arguments.batches):
        parser.error(f"--rounds are {arguments.rounds}; allowed: one number for each of --batches {arguments.batches}")
    if BASELINE not in arguments.ways:
        parser.error(f"--ways lacks {BASELINE!r}, with which all are compared")
    return arguments


@dataclass(frozen=True)
class Task:
    """Work that is compared after each start.

    Attributes:
        section: section of the record; "generated" or "prefill".
        work: the work, without its kind.
        rounds: number of rounds that count; one more before them warms up.
    """

    section: str
    work: Work
    rounds: int

    def rate(self, took: Took) -> float:
        """Tokens per second: generated ones, or those of the prompts in the section "prefill"."""
        work = self.work
        return work.requests * (work.max_tokens if self.section == "generated" else work.prompt_tokens) / took.seconds

    def __str__(self) -> str:
        work = self.work
        if self.section == "generated":
            return f"batch {work.requests}, {work.max_tokens} tokens each"
        return f"prefill of {work.requests} prompts of {work.prompt_tokens} tokens"


def main() -> None:
    """Measure all tasks after every start, print the figures and write the record after each task."""
    arguments = parse()
    model = arguments.model or demo_model_path()
    ways = {name: way for name, way in WAYS.items() if name in arguments.ways}
    took: dict[Task, list[Rounds]] = {task: [] for task in tasks(arguments)}
    measured: dict[str, Any] = {}
    names = dict.fromkeys(way.engine for way in ways.values())
    if arguments.fill_cache:
        with running(model, names, arguments, together=True):
            pass
    for start in range(arguments.starts):
        together = arguments.together or start < arguments.starts - 1  # at the last start each engine is timed alone
        with running(model, names, arguments, together) as engines:
            for task, starts in took.items():
                starts.append(rounds_of(engines, ways, task))
                check_that_steering_steers(starts[-1][0])
                show(task, throughput(starts[-1:], task))
                # Written at once, since a full run takes long and may be stopped.
                measured = {**measured_of(took), "engines": standing(engines, arguments)}
                if arguments.out is not None:
                    about = {name: value for name, value in vars(arguments).items() if name not in ("out", "small")}
                    record.write(arguments.out, measured, **about | {"model": model.name})
    if arguments.starts > 1:
        print("over all starts:")
        for task, starts in took.items():
            show(task, throughput(starts, task))
    for name, figure in measured["engines"].items():
        print(f"{name:18} memory {figure['memory_gib']}")


def tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """Yield all tasks that are measured after each start."""
    pauses = arguments.turns == "step"
    for batch, rounds in zip(arguments.batches, arguments.rounds, strict=True):
        max_tokens = min(max(arguments.tokens // batch, MAX_TOKENS[0]), MAX_TOKENS[1])
        yield Task("generated", Work("", batch, arguments.prompt_tokens, max_tokens, pauses), rounds)
    for batch in arguments.prefill_batches:
        yield Task("prefill", Work("", batch, arguments.prefill_tokens, 1, pauses), arguments.prefill_rounds)


def measured_of(took: Mapping[Task, list[Rounds]]) -> dict[str, Any]:
    """The record of all measurements so far."""
    measured: dict[str, Any] = {"generated": {}, "prefill": {}}
    for task, starts in took.items():
        if not starts:
            continue
        found: dict[str, Any] = {"throughput": throughput(starts, task)}
        if task.section == "generated":
            found["max_tokens"] = task.work.max_tokens
            for clock in ("first_token", "inter_token"):
                found[clock] = compared(starts, attrgetter(clock))
        measured[task.section][str(task.work.requests)] = found
    return measured


def standing(engines: Mapping[str, EngineProcess], arguments: argparse.Namespace) -> dict[str, Any]:
    """Start-up time and current memory of each engine."""
    last = Work("plain", 1, arguments.prompt_tokens, 1)
    return {
        name: {
            "start_seconds": None if arguments.together else engine.start_seconds,
            "memory_gib": engine.do(last).memory_gib,
        }
        for name, engine in engines.items()
    }


@contextmanager
def running(
    model: Path, names: Collection[str], arguments: argparse.Namespace, together: bool
) -> Iterator[dict[str, EngineProcess]]:
    """Start the engines of these names and yield them ready for work; close them at the end.

    `together` starts them at once, which makes their start-up times meaningless.
    """
    num_layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    layers = {"hooked": arguments.layers, "all hooked": list(range(num_layers))}
    engine_args = {
        "model": str(model),
        "dtype": arguments.dtype,
        "load_format": arguments.load_format,
        "skip_tokenizer_init": arguments.load_format == "dummy",
        "enforce_eager": arguments.eager,
        **COMPILED_WITH,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": int(arguments.kv_gib * 2**30),
        "seed": 0,
        # vLLM checks before it starts that this share of memory is free, even with a fixed KV size; share it out.
        "gpu_memory_utilization": 0.9 / len(names),
        "disable_log_stats": False,  # for the requests' timestamps
    }
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder, ExitStack() as started:
        engines: dict[str, EngineProcess] = {}

        def start(name: str) -> EngineProcess:
            plugin = not name.startswith(BASELINE)
            return EngineProcess(layers.get(name), plugin, engine_args, Path(folder, f"{name}.log"))

        for group in started_at_once(names) if together else [[name] for name in names]:
            for name in group:
                engines[name] = start(name)
                started.callback(engines[name].close)
            for name in group:
                print(f"{name}: started in {engines[name].wait().start_seconds:.0f} s", flush=True)
        yield engines


def started_at_once(names: Collection[str]) -> list[list[str]]:
    """Two groups of engines: first those that compile their own graph, then those that reuse one."""
    return [[name for name in names if (name in SAME_GRAPH) == last] for last in (False, True)]


@dataclass(frozen=True)
class Pair:
    """Measurements of a way and of plain vLLM, taken in turn."""

    way: Took
    plain: Took


Rounds = list[dict[str, Pair]]
"""For each round, way -> its pair."""


def rounds_of(engines: Mapping[str, EngineProcess], ways: Mapping[str, Way], task: Task) -> Rounds:
    """Measure every way against plain vLLM for `task.rounds` rounds, after one warm-up round."""

    def pair(name: str, is_first: bool) -> Pair:
        names = (name, BASELINE) if is_first else (BASELINE, name)
        took = side_by_side(
            {one: engines[ways[one].engine].turns(replace(task.work, kind=ways[one].kind)) for one in names}
        )
        return Pair(took[name], took[BASELINE])

    others = [name for name in ways if name != BASELINE]
    rounds = [{name: pair(name, number % 2 == 0) for name in others} for number in range(task.rounds + 1)]
    return rounds[1:]


def check_that_steering_steers(took: Mapping[str, Pair]) -> None:
    """Check that steered requests got other tokens than unsteered ones.

    Raises:
        SystemExit: they got the same tokens, so the benchmark would measure nothing.
    """
    for name in ("steered", "stacked"):
        if name in took and took[name].way.tokens == took[name].plain.tokens:
            raise SystemExit(f"the requests of {name!r} got the tokens of unsteered ones; raise LARGEST_ALPHA.")


def throughput(starts: Sequence[Rounds], task: Task) -> dict[str, dict[str, Any]]:
    """``compared`` on the typical round of each start; with a single start on its rounds, which show the spread."""
    return compared(starts if len(starts) == 1 else [[typical(rounds)] for rounds in starts], task.rate)


def typical(rounds: Rounds) -> dict[str, Pair]:
    """A synthetic round in which every step takes its median time over these rounds, which all do the same work.

    A burst of other load that hits one of two engines in one step then does not count.
    """

    def call(took: Sequence[Took]) -> Took:
        return replace(took[0], laps=[statistics.median(lap) for lap in zip(*(one.laps for one in took), strict=True)])

    return {
        name: Pair(call([round_[name].way for round_ in rounds]), call([round_[name].plain for round_ in rounds]))
        for name in rounds[0]
    }


def compared(starts: Sequence[Rounds], measure: Callable[[Took], float]) -> dict[str, dict[str, Any]]:
    """A figure for each way, compared with plain vLLM. Plain vLLM's own figure is over all pairs."""
    all_pairs = [pair for rounds in starts for round_ in rounds for pair in round_.values()]
    found = figures([{BASELINE: measure(pair.plain)} for pair in all_pairs], BASELINE)
    for name in starts[0][0]:
        both = [
            [{name: measure(round_[name].way), BASELINE: measure(round_[name].plain)} for round_ in rounds]
            for rounds in starts
        ]
        found[name] = figures_of_starts(both, BASELINE)[name]
    return {name: asdict(figure) for name, figure in found.items()}


def show(task: Task, throughput: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the throughput of every way."""
    print(task)
    for name, values in throughput.items():
        figure = Figure(**values)
        low, high = interval(figure.ratios)
        print(
            f"  {name:18} {figure.median:8.1f} tokens/s   ratio {figure.ratio:.3f} ({low:.3f} – {high:.3f})", flush=True
        )


if __name__ == "__main__":
    main()
