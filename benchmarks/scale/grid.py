"""The driver's memory and time by the number of rows of a grid: planned, run, killed, resumed and scored.

    python -m benchmarks.scale.grid [--rows 10000 100000 1000000] [--done 0.999] [--out FILE]

The engine is a stand-in that answers at once (`instant_engine`), so a row costs what the batch jobs around it cost, and
the time left that is shown means nothing for a real engine. All else is what `vllm-steer study run` does in one
process: the index of stored rows, the shards, the requests, the parts, the attempt log, the progress lines.

Each grid has three processes. The first plans it, runs the share `--done` and is ended by SIGKILL in the middle of a
batch; the second resumes it to its end; the third scores it. `resume_seconds` runs from the second process's first look
at the stored rows to the first new row that the engine gets, `restart_seconds` from the start of that process, imports
included, those of vLLM and Ray too. Memory is the peak of the process; `mib_after_a_batch` is what the peak was after
the imports and one batch. Grids have a multiple of 150 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from batch_jobs.engine.progress import ConsoleProgress
from batch_jobs.scoring.compute_scores import score_generations

ROWS = (10_000, 100_000, 1_000_000)
ROWS_A_PART = 1024  # a study's default
MAX_RESUME_SECONDS = 30.0
MAX_GROWTH_MIB = 32.0
"""Most that the driver of the largest grid may need beyond that of the smallest: 9 bytes a row are 9 MiB a million."""


def main() -> None:
    """Measure each grid and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--done", type=float, default=0.999, help="share of the rows that is stored before the kill")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    parser.add_argument("--drive", nargs=3, default=None, help=argparse.SUPPRESS)  # folder, rows, rows before the kill
    parser.add_argument("--score", type=Path, default=None, help=argparse.SUPPRESS)  # folder
    arguments = parser.parse_args()
    if arguments.drive:
        folder, rows, kill_after = arguments.drive
        drive(Path(folder), int(rows), int(kill_after))
        return
    if arguments.score:
        score(arguments.score)
        return
    grids = {str(rows): measure(rows, arguments.done) for rows in arguments.rows}
    few, many = (grids[str(rows)] for rows in (min(arguments.rows), max(arguments.rows)))
    growth = max(many[name]["peak_mib"] - few[name]["peak_mib"] for name in ("run", "resume"))
    measured = {
        "driver_growth_mib": growth,
        "bytes_a_row": growth * 2**20 / max(1, max(arguments.rows) - min(arguments.rows)),
        "resume_seconds": many["resume"]["resume_seconds"],
    }
    for name, value in measured.items():
        print(f"{name:24} {value:10.2f}")
    if arguments.out:
        from benchmarks.harness import record  # imports torch, which the process that scores must not

        bounds = {"resume_seconds": MAX_RESUME_SECONDS, "driver_growth_mib": MAX_GROWTH_MIB}
        about = {"engine": "a stand-in that answers at once; no model", "rows_per_part": ROWS_A_PART}
        record.write(arguments.out, {"ceilings": bounds, "figures": measured, "grids": grids}, **about)


def measure(rows: int, done: float) -> dict[str, Any]:
    """The figures of the three processes of one grid."""
    with tempfile.TemporaryDirectory(prefix="bench-grid-") as folder:
        kill_after = int(rows * done) // ROWS_A_PART * ROWS_A_PART
        figures = {
            "run": child(["--drive", folder, str(rows), str(kill_after)], ends=-signal.SIGKILL),
            "resume": child(["--drive", folder, str(rows), "0"]),
            "score": child(["--score", folder]),
        }
    assert figures["resume"]["reused"] == kill_after, figures
    assert figures["resume"]["generated"] + kill_after == figures["score"]["samples"] > rows - 150, figures
    for name, of_process in figures.items():
        print(f"{rows:>9} {name:8}", json.dumps(of_process), flush=True)
    return figures


def child(arguments: Sequence[str], ends: int = 0) -> dict[str, Any]:
    """Run this module with the arguments; its figures, the last line that it printed, and its progress lines."""
    command = [sys.executable, "-m", "benchmarks.scale.grid", *arguments]
    start = time.time()
    ran = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if ran.returncode != ends:
        raise RuntimeError(f"{' '.join(command)} ended with {ran.returncode} instead of {ends}: {ran.stdout[-2000:]}")
    lines = ran.stdout.splitlines()
    figures: dict[str, Any] = json.loads(lines[-1])
    progress = [line for line in lines if line.startswith("All batches: ")]
    if "first_row_at" in figures:
        figures["restart_seconds"] = figures.pop("first_row_at") - start
    return {**figures, "wall_seconds": time.time() - start, "progress": progress[:1] + progress[-1:]}


def drive(folder: Path, rows: int, kill_after: int) -> None:
    """Run the grid's missing rows; with `kill_after`, kill this process when it has stored so many."""
    from batch_jobs.generate.local_executor import LocalExecutor
    from batch_jobs.pipeline import RunOptions, generate_missing
    from benchmarks.scale.bench import a_job, a_study
    from benchmarks.scale.instant_engine import InstantEngine, instant

    handed = 0
    figures: dict[str, Any] = {}
    began = time.perf_counter()

    class Counting(InstantEngine):
        """Notes when the first row comes, and kills the process when enough did."""

        def generate(
            self, prompts: Sequence[Mapping[str, Any]], sampling_params: Sequence[Any], *, use_tqdm: bool
        ) -> list[Any]:
            nonlocal handed
            if sampling_params[0].max_tokens == 1:  # the prompts are read
                return super().generate(prompts, sampling_params, use_tqdm=use_tqdm)
            if not handed:
                figures.update(resume_seconds=time.perf_counter() - began, first_row_at=time.time())
            if handed == ROWS_A_PART:
                figures.update(mib_after_a_batch=peak_mib())
            if kill_after and handed >= kill_after:
                print(json.dumps({**figures, "peak_mib": peak_mib()}), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            handed += len(prompts)
            return super().generate(prompts, sampling_params, use_tqdm=use_tqdm)

    job = a_job(a_study("instant", rows, rows_per_part=ROWS_A_PART), folder / "run")
    with instant():
        engine = SimpleNamespace(engine=Counting(), revision=None)
        console = Console(file=sys.stdout, width=200)
        executor = LocalExecutor(engine, ConsoleProgress(console))  # type: ignore[arg-type]
        began = time.perf_counter()
        done, reused = generate_missing(job, lambda: executor, RunOptions())
    print(json.dumps({**figures, "generated": done.rows, "reused": reused, "peak_mib": peak_mib()}))


def score(folder: Path) -> None:
    """Score the grid, and print the number of rows with the peak memory of this process and of the largest child."""
    scores = score_generations(folder / "run" / "generations")
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    samples = sum(one.samples for one in scores.conditions)
    print(json.dumps({"samples": samples, "peak_mib": peak_mib(), "worker_mib": worker}))


def peak_mib() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
