"""How cost grows with the number of α, of engines and of rows.

    python -m benchmarks.scale.bench [--small] [--out FILE] [--rows-a-second-a-gpu 50]

- alphas: one engine of a tiny random model gets all requests in one call (256 run, the others queue), each with its own
  prompt; the number of distinct α among them grows. The model is tiny so that it cannot hide a cost of α.
- actors: a study's grid on Ray, one engine of the tiny model per core; rows per second from the first request's arrival
  to the last row's end, without engine starts.
- driver: the cost of a row outside the engines, with engines that answer at once (`instant_engine`). It is the
  difference of two grids, since Ray's start costs the driver seconds once. From it follow how busy 64 GPUs of an
  assumed rate would keep the driver, and at which rate the driver would limit them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, so that only the engine is timed
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
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
from benchmarks.harness.rounds import figures, in_turn
from benchmarks.scale.instant_engine import CONCEPT, NUM_LAYERS, InstantShardWorker, instant
from vllm_steer import Direction, Steering, close_llm, load_llm, register_directions, steered

LAYER = 2
NUM_GPUS = 64
ROWS_A_PART = 1024  # a study's default
SCENARIOS = ("food_delivery", "the_listener", "the_protector")


@dataclass(frozen=True)
class Form:
    """The size of the benchmark.

    Attributes:
        requests: requests of a call in the α part.
        request_tokens: tokens that each of them generates.
        alphas: numbers of distinct α.
        rounds: rounds of the α part.
        actor_rows: rows of the grid that the actors share.
        actor_tokens: tokens that each row generates.
        actor_rounds: rounds of the actor part.
        driver_rows: rows in the larger grid of the driver part.
    """

    requests: int
    request_tokens: int
    alphas: tuple[int, ...]
    rounds: int
    actor_rows: int
    actor_tokens: int
    actor_rounds: int
    driver_rows: int


FULL = Form(10_000, 4, (1, 100, 10_000), 5, 600, 50, 3, 150_000)
SMALL = Form(1_000, 4, (1, 1_000), 3, 150, 50, 1, 60_000)


def main() -> None:
    """Measure all three parts and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer requests, rows and rounds")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    parser.add_argument("--rows-a-second-a-gpu", type=float, default=50.0, help="assumed in the projection")
    arguments = parser.parse_args()
    form = SMALL if arguments.small else FULL
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        model = save_random_checkpoint(Path(folder, "model"), "tiny", tokenizer=demo_model_path())
        measured = {
            "driver": driver(Path(folder), form, arguments.rows_a_second_a_gpu),
            "actors": actors(Path(folder), model, form),
            "alphas": alphas(model, form),
        }
    if arguments.out:
        record.write(arguments.out, measured, model={"random": SHAPES["tiny"]}, form=asdict(form))


def alphas(model: Path, form: Form) -> dict[str, Any]:
    """Requests per second by the number of distinct α among them, against one α."""
    llm = load_llm(
        str(model),
        layers=[LAYER],
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=1 << 30,
        seed=0,
    )
    draw = np.random.default_rng(0)
    width = SHAPES["tiny"]["hidden_size"]
    register_directions(llm, [Direction("noise", LAYER, draw.standard_normal(width)).normalised()])
    # All prompts differ, so the prefix cache, where requests of one α could share blocks, gives no α an advantage.
    prompts = [
        {"prompt_token_ids": ids}
        for ids in draw.integers(100, SHAPES["tiny"]["vocab_size"], (form.requests, 16)).tolist()
    ]

    def requests_a_second(count: int) -> float:
        values = np.linspace(9.5, 10.5, count)  # nearly equal, so that the answers are alike
        sampling = {"temperature": 0.7, "max_tokens": form.request_tokens, "ignore_eos": True}
        params = [
            steered(sampling, [Steering("noise", float(values[index % count]), layer=LAYER)])
            for index in range(form.requests)
        ]
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return len(outputs) / (time.perf_counter() - start)

    ways: dict[str, Callable[[], float]] = {str(count): partial(requests_a_second, count) for count in form.alphas}
    requests_a_second(form.requests)  # warm-up, compilation included
    rounds = in_turn(ways, form.rounds)
    close_llm(llm)
    against_one = figures(rounds, "1")
    print(f"\n{'distinct α':>12} {'requests/s':>12} {'to one α':>10}")
    for count, figure in against_one.items():
        spread = f"({figure.ratio_low:.3f} to {figure.ratio_high:.3f})"
        print(f"{count:>12} {figure.median:12.1f} {figure.ratio:10.3f} {spread}", flush=True)
    return {"figures": {name: asdict(figure) for name, figure in against_one.items()}, "rounds": rounds}


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
        job = a_job(a_study("instant", count, rows_per_part=ROWS_A_PART), folder / f"ray-{count}")
        start = time.process_time()
        with patch.object(ray_executor, "ShardWorker", InstantShardWorker):
            on_ray(job, "instant", Pool(workers=2))
        taken = time.process_time() - start
        assert read_rows(job.run.generations).num_rows == count
        return taken

    few, many = form.driver_rows // 10, form.driver_rows
    seconds_few, seconds_many = driver_seconds(few), driver_seconds(many)
    a_row = (seconds_many - seconds_few) / (many - few)

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
