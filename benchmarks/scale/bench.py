"""How cost grows with the number of different specs, of registered directions, of engines and of rows.

    python -m benchmarks.scale.bench [--small] [--parts specs,registered] [--out FILE] [--rows-a-second-a-gpu 50]

- specs: one engine of a tiny random model, whose bank holds 10,000 directions, gets all requests in one call (256 run,
  the others queue), each with its own prompt; the number of different specs among them grows. A spec is a direction and
  an α, both its own, and comes again in every call. The model is tiny so that it cannot hide a cost of the plugin.
- registered: the same engine and one spec; the number of directions in the bank grows.
- actors: a study's grid on Ray, one engine of the tiny model per core; rows per second from the first request's arrival
  to the last row's end, without engine starts.
- driver: the cost of a row outside the engines, with engines that answer at once (`instant_engine`). It is the
  difference of two grids, since Ray's start costs the driver seconds once. From it follow how busy 64 GPUs of an
  assumed rate would keep the driver, and at which rate the driver would limit them.

The first two take turns within the life of one engine, on one thread, with calls of one size and the garbage collected
before each. Their rates are per second of the process's CPU time, which other users of the machine disturb less than
wall time; the rates by wall time stand beside them.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, so that only the engine is timed
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other take CPU time too

import numpy as np
import psutil
import pyarrow.compute as pc
from rich.console import Console

from batch_jobs.config.study import Study
from batch_jobs.demo_model import demo_model_path
from batch_jobs.directions.directions_and_norms import Probes
from batch_jobs.engine.progress import ConsoleProgress
from batch_jobs.generate import ray_executor
from batch_jobs.generate.ray_executor import ray_session
from batch_jobs.generate.ray_options import Pool
from batch_jobs.generate.shard_runner import ShardJob, ShardRunner
from batch_jobs.rows.row_ids import RowIds
from batch_jobs.rows.shards import make_shards
from batch_jobs.rows.store import read_rows
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import load_scenarios
from benchmarks.harness import record
from benchmarks.harness.random_checkpoint import SHAPES, save_random_checkpoint
from benchmarks.harness.rounds import figures, in_turn, interval
from benchmarks.scale.instant_engine import CONCEPT, NUM_LAYERS, InstantShardWorker, instant
from vllm_steer import Direction, Steering, close_llm, load_llm, register_directions, steered
from vllm_steer.engine.front.admission import admission_of
from vllm_steer.engine.registry import DirectionRegistry
from vllm_steer.schema.request_spec import RequestSpec

LAYER = 2
NUM_GPUS = 64
ROWS_A_PART = 1024  # a study's default
SCENARIOS = ("food_delivery", "the_listener", "the_protector")


@dataclass(frozen=True)
class Form:
    """The size of the benchmark.

    Attributes:
        directions: slots of the bank, and the most directions in it.
        counts: numbers of different specs, and of registered directions.
        requests: requests of a call in the part ``specs``, all in flight at once.
        rounds: rounds of this part.
        short_requests: requests of a call in the part ``registered``.
        short_rounds: rounds of this part.
        request_tokens: tokens that each request generates in both.
        actor_rows: rows of the grid that the actors share.
        actor_tokens: tokens that each row generates.
        actor_rounds: rounds of the actor part.
        driver_rows: rows in the larger grid of the driver part.
    """

    directions: int
    counts: tuple[int, ...]
    requests: int
    rounds: int
    short_requests: int
    short_rounds: int
    request_tokens: int
    actor_rows: int
    actor_tokens: int
    actor_rounds: int
    driver_rows: int


COUNTS = (1, 10, 100, 1_000, 10_000)
FULL = Form(10_000, COUNTS, 10_000, 6, 2_048, 16, 1, 150, 25, 2, 300_000)
SMALL = Form(1_000, COUNTS[:4], 1_000, 3, 512, 3, 1, 150, 25, 1, 100_000)
PARTS = ("driver", "actors", "specs", "registered")
PROMPT_TOKENS = 4
ADMISSIONS = 5_000  # specs that are admitted for the time of one


def main() -> None:
    """Measure the parts and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer requests, rows and rounds")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure, of " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    parser.add_argument("--rows-a-second-a-gpu", type=float, default=50.0, help="assumed in the projection")
    arguments = parser.parse_args()
    form, parts = SMALL if arguments.small else FULL, arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()}; allowed: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        model = save_random_checkpoint(Path(folder, "model"), "tiny", tokenizer=demo_model_path())
        measured: dict[str, Any] = {}
        if "driver" in parts:
            measured["driver"] = driver(Path(folder), form, arguments.rows_a_second_a_gpu)
        if "actors" in parts:
            measured["actors"] = actors(Path(folder), model, form)
        if {"specs", "registered"} & set(parts):
            measured |= in_one_engine(model, form, parts)
    if arguments.out:
        record.write(arguments.out, measured, model={"random": SHAPES["tiny"]}, form=asdict(form))


def in_one_engine(model: Path, form: Form, parts: Collection[str]) -> dict[str, Any]:
    """The parts ``specs`` and ``registered``, as far as they are asked."""
    llm = load_llm(
        str(model),
        layers=[LAYER],
        steer={"max_directions": form.directions},
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        seed=0,
    )
    draw = np.random.default_rng(0)
    width = SHAPES["tiny"]["hidden_size"]
    noise_SD = draw.standard_normal((form.directions, width))
    directions = [Direction(f"noise-{slot}", LAYER, row_D).normalised() for slot, row_D in enumerate(noise_SD)]
    # All prompts differ, so that requests of one spec share no blocks of the prefix cache.
    ids = draw.integers(100, SHAPES["tiny"]["vocab_size"], (form.requests, PROMPT_TOKENS)).tolist()
    work = _Work(llm, directions, [{"prompt_token_ids": one} for one in ids], form.request_tokens)
    work.register(form.directions)
    rss_registered = _rss_mib()
    work.call(form.requests, form.directions)  # warm-up, compilation included
    measured: dict[str, Any] = {
        "engine": {
            "rss_mib_without_directions": work.rss_mib_empty,
            "rss_mib_with_all_directions": rss_registered,
            "bank_mib": form.directions * width * 4 / 2**20,
        }
    }
    if "specs" in parts:
        ways = {str(count): partial(work.call, form.requests, count) for count in form.counts}
        measured["specs"] = _flatness("different specs", in_turn(ways, form.rounds))
    if "registered" in parts:

        def with_registered(count: int) -> _Call:
            work.register(count)
            return work.call(form.short_requests, 1)

        counts = {str(count): partial(with_registered, count) for count in form.counts}
        with_registered(1)
        measured["registered"] = _flatness("registered", in_turn(counts, form.short_rounds))
    close_llm(llm)
    return measured


@dataclass(frozen=True)
class _Call:
    """One call of the engine.

    Attributes:
        cpu, wall: requests per second of this process's CPU time, and of wall time.
        admission: microseconds of CPU time in which one request's spec is admitted.
        rss_mib: memory of the process at the end.
    """

    cpu: float
    wall: float
    admission: float
    rss_mib: float


class _Work:
    """The calls of one engine.

    Args:
        llm: the engine.
        directions: the directions to register.
        prompts: one prompt a request.
        max_tokens: tokens that each request generates.
    """

    def __init__(
        self, llm: Any, directions: Sequence[Direction], prompts: Sequence[dict[str, Any]], max_tokens: int
    ) -> None:
        self._llm, self._directions, self._prompts = llm, directions, prompts
        self._sampling = {"temperature": 0.7, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
        self._admission = admission_of(llm.llm_engine.input_processor)
        self.rss_mib_empty = _rss_mib()

    def register(self, count: int) -> None:
        """Make the first ``count`` directions, and no others, the registered ones."""
        registry = self._admission.registry
        assert isinstance(registry, DirectionRegistry)
        for one in list(registry.all()):
            registry.remove(one.name)
        register_directions(self._llm, self._directions[:count])

    def call(self, num_requests: int, count: int) -> _Call:
        """Run as many requests with ``count`` different specs among them."""
        alphas = np.linspace(9.5, 10.5, count).tolist()  # nearly equal, so that the answers are alike
        entries = [Steering(f"noise-{number}", alpha, layer=LAYER) for number, alpha in enumerate(alphas)]
        specs = [RequestSpec((entry,)) for entry in entries]
        self._llm.reset_prefix_cache()
        gc.collect()
        start = time.process_time()
        for index in range(ADMISSIONS):
            self._admission.resolve(str(index), specs[index % count], PROMPT_TOKENS)
        admission = (time.process_time() - start) / ADMISSIONS
        cpu, wall = time.process_time(), time.perf_counter()
        params = [steered(self._sampling, [entries[index % count]]) for index in range(num_requests)]
        outputs = self._llm.generate(self._prompts[:num_requests], params, use_tqdm=False)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert len(outputs) == num_requests
        return _Call(num_requests / cpu, num_requests / wall, 1e6 * admission, _rss_mib())


def _flatness(title: str, rounds: Sequence[Mapping[str, _Call]]) -> dict[str, Any]:
    """Rates against those of one, by CPU and wall time, with admission and memory; printed too."""
    by_cpu = [{name: one.cpu for name, one in each.items()} for each in rounds]
    by_wall = [{name: one.wall for name, one in each.items()} for each in rounds]
    against_one, walls = figures(by_cpu, "1"), figures(by_wall, "1")
    admission = {name: statistics.median(each[name].admission for each in rounds) for name in against_one}
    rss_mib = {name: max(each[name].rss_mib for each in rounds) for name in against_one}
    print(
        f"\n{title:>16} {'requests/s':>12} {'to one':>8} {'':18} {'by wall':>8} {'admission, µs':>14} {'RSS, MiB':>9}"
    )
    for name, figure in against_one.items():
        low, high = interval(figure.ratios)
        print(
            f"{name:>16} {figure.median:12.1f} {figure.ratio:8.3f} ({low:.3f} to {high:.3f}) {walls[name].ratio:9.3f} "
            f"{admission[name]:14.2f} {rss_mib[name]:9.0f}",
            flush=True,
        )
    return {
        "figures": {name: asdict(figure) for name, figure in against_one.items()},
        "figures_by_wall": {name: asdict(figure) for name, figure in walls.items()},
        "admission_microseconds": admission,
        "rss_mib": rss_mib,
    }


def _rss_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def actors(folder: Path, model: Path, form: Form) -> dict[str, Any]:
    """Rows per second of one and of two engines on Ray, one core each, against one."""
    study = a_study(str(model), form.actor_rows, rows_per_part=max(1, form.actor_rows // 10), tokens=form.actor_tokens)

    def rows_a_second(workers: int) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as run:
            job = a_job(study, Path(run))
            on_ray(job, str(model), Pool(workers=workers, cpus_per_worker=1))
            table = read_rows(job.run.generations)
        assert table["error"].null_count == table.num_rows == form.actor_rows
        ends = [
            began.timestamp() + took
            for began, took in zip(table["started_at"].to_pylist(), table["seconds"].to_pylist(), strict=True)
        ]
        seconds: float = max(ends) - pc.min(table["started_at"]).as_py().timestamp()
        return form.actor_rows / seconds

    ways = {str(workers): partial(rows_a_second, workers) for workers in (1, 2)}
    rounds = in_turn(ways, form.actor_rounds)
    against_one = figures(rounds, "1")
    print(f"\n{'actors':>12} {'rows/s':>12} {'to one':>10}")
    for name, figure in against_one.items():
        print(f"{name:>12} {figure.median:12.1f} {figure.ratio:10.3f}", flush=True)
    return {"figures": {name: asdict(figure) for name, figure in against_one.items()}, "rounds": rounds}


def driver(folder: Path, form: Form, rows_a_second_a_gpu: float) -> dict[str, Any]:
    """CPU microseconds per row in the driver, and in an actor outside its engine; the consequence for 64 GPUs."""

    def driver_seconds(count: int) -> float:
        """CPU seconds of this process for a grid on Ray with two actors whose engines take no time."""
        job = a_job(a_study("instant", count, rows_per_part=ROWS_A_PART), Path(tempfile.mkdtemp(dir=folder)))
        start = time.process_time()
        with patch.object(ray_executor, "ShardWorker", InstantShardWorker):
            on_ray(job, "instant", Pool(workers=2))
        taken = time.process_time() - start
        assert read_rows(job.run.generations).num_rows == count
        return taken

    few, many = form.driver_rows // 10, form.driver_rows
    driver_seconds(few)  # imports Ray
    seconds_few, seconds_many = driver_seconds(few), driver_seconds(many)
    a_row = (seconds_many - seconds_few) / (many - few)
    if a_row <= 0:
        raise SystemExit(
            f"{many:,} rows took {seconds_many:.1f} CPU seconds of the driver and {few:,} took {seconds_few:.1f}, so a "
            "row's share is lost in what Ray's start costs; use a quieter machine, or more rows."
        )

    job = a_job(a_study("instant", many, rows_per_part=ROWS_A_PART), folder / "actor")
    start = time.process_time()
    shards = make_shards(job.rows, RowIds(), rows_per_part=ROWS_A_PART, workers=2)
    built = time.process_time()
    with instant() as engine:
        runner = ShardRunner(engine, job, model_revision=None, progress=ConsoleProgress(Console(), quiet=True))
        for shard in shards:
            runner.run(shard)
    done = time.process_time()
    measured = {
        "driver_seconds_once": seconds_few - few * a_row,
        "driver_microseconds_a_row": a_row * 1e6,
        "of_these_building_rows_and_shards": (built - start) / many * 1e6,
        "actor_microseconds_a_row": (done - built) / many * 1e6,
        "gpus": NUM_GPUS,
        "assumed_rows_a_second_a_gpu": rows_a_second_a_gpu,
        "driver_busy_share": NUM_GPUS * rows_a_second_a_gpu * a_row,
        "driver_is_the_limit_at_rows_a_second_a_gpu": 1 / a_row / NUM_GPUS,
    }
    for name, value in measured.items():
        print(f"{name:44} {value:10.3f}", flush=True)
    return measured


def on_ray(job: ShardJob, location: str, pool: Pool) -> None:
    """Run the job's whole grid on a Ray session of its own."""
    shards = make_shards(job.rows, RowIds(), rows_per_part=job.study.rows_per_part, workers=pool.workers)
    with ray_session(pool, job.study, location, Console(), quiet=True) as executor:
        executor.run(job, shards)


def a_study(model: str, rows: int, *, rows_per_part: int, tokens: int = 200) -> Study:
    """A study of one layer, three scenarios and 50 α, with as many samples as give `rows` rows."""
    cells = len(SCENARIOS) * 50
    return Study.model_validate(
        {
            "name": "scale",
            "concept": {"name": CONCEPT, "outcome": "judge"},
            "model": model,
            "max_model_len": 1024,
            "prompt_format": "raw",
            "engine": {"enforce_eager": True, "kv_cache_gib": 0.5},
            "extract": {"layers": [LAYER]},
            "steer": {
                "layers": [LAYER],
                "alphas": np.arange(50.0).tolist(),
                "scenarios": SCENARIOS,
                "samples": rows // cells,
            },
            "sampling": {"max_tokens": tokens},
            "likelihood": False,  # one pass per row
            "rows_per_part": rows_per_part,
        }
    )


def a_job(study: Study, run: Path) -> ShardJob:
    """The study's job with a random direction; nothing is extracted."""
    run.mkdir(parents=True, exist_ok=True)  # workers refuse a run directory that they do not see
    vector_D = np.random.default_rng(0).standard_normal(SHAPES["tiny"]["hidden_size"]).astype(np.float32)
    directions = {(CONCEPT, LAYER): Direction(CONCEPT, LAYER, vector_D).normalised()}
    return ShardJob(study, load_scenarios(None), NoiseProbes(directions), RunDirectory(run), {"study": "scale"})


@dataclass(frozen=True)
class NoiseProbes(Probes):
    """Directions without a validation."""

    validation: Any = None

    @property
    def mean_residual_norms(self) -> dict[int, float]:
        """1.0 for every layer."""
        return dict.fromkeys(range(NUM_LAYERS), 1.0)


if __name__ == "__main__":
    main()
