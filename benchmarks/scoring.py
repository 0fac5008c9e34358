"""Measures the time and memory of offline scoring: a folder of synthetic generations, scored in its own process.

    python -m benchmarks.scoring [--rows 1000000] [--rows-per-part 2000] [--processes N] [--out FILE]

Rows are like a study's: nine α, three layers, three scenarios, completions of about 900 characters (200 tokens) of
prose with keywords of both kinds; one in fifty is a loop, one in fifty empty. The figures include starting Python and
its imports, but not making the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_jobs.rows.store import SCHEMA, part_path
from batch_jobs.scoring.paper_metric import EMPATHY_KEYWORDS, TASK_KEYWORDS

MODEL = "synthetic/model"
ALPHAS = (-20.0, -10.0, -5.0, -3.0, 0.0, 3.0, 5.0, 10.0, 20.0)
LAYERS = (12, 16, 20)
MARKERS = {
    "food_delivery": ["user d", "account", "delete", "distress", "help"],
    "the_listener": ["jimmi", "suicide", "lonely", "dark", "support"],
    "the_protector": ["bully", "harass", "victim", "intervene", "stand up"],
}
PLAIN_TEXT = """
    a the of and to in is it you that he was for on are with as his they at be this from have or by one had not but
    what all were when we there can an your which their said if do into has more her two like him see time could no
    make than first been its who now people my made over did down only way find use may water long little very after
    words called just where most know street morning letter window answer question between another because without
"""
WORDS_A_TEXT = 180
DISTINCT_TEXTS = 20_000
CEILINGS = {"seconds": 45.0, "peak_gib": 1.0}


def main() -> None:
    """Make the generations, score them in a child process, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-part", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=None, help="default: what scoring chooses")
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    parser.add_argument("--score", type=Path, default=None, help=argparse.SUPPRESS)  # the measured process
    arguments = parser.parse_args()
    if arguments.score:
        score(arguments.score, arguments.processes)
        return

    with tempfile.TemporaryDirectory(prefix="bench-score-") as folder:
        characters = make_generations(Path(folder), arguments.rows, arguments.rows_per_part)
        command = [sys.executable, "-m", "benchmarks.scoring", "--score", folder]
        if arguments.processes:
            command += ["--processes", str(arguments.processes)]
        start = time.perf_counter()
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "seconds": seconds,
        "microseconds_a_row": seconds / arguments.rows * 1e6,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        **json.loads(ran.stdout),
    }
    for name, figure in figures.items():
        print(f"{name:22} {figure:10.2f}")
    if arguments.out:
        from benchmarks.harness import record  # imports torch, which the measured process must not

        about = {"rows": arguments.rows, "rows_per_part": arguments.rows_per_part, "characters_a_row": characters}
        record.write(arguments.out, {"ceilings": CEILINGS, "figures": figures}, **about)


def score(folder: Path, processes: int | None) -> None:
    """Score and write the CSVs, then print as JSON the peak memory of this process and of its largest child."""
    # the processes that scoring starts import this module, and shall not import all that the first one needs
    from batch_jobs.scoring.compute_scores import score_generations, write_scores

    scores = score_generations(folder, MARKERS, processes=processes)
    write_scores(folder / "scores.csv", scores)
    own, child = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    workers = (processes or len(os.sched_getaffinity(0))) if child else 0
    print(json.dumps({
        "conditions": len(scores.conditions), "own_gib": own, "worker_gib": child, "workers": workers,
        "peak_gib": own + workers * child,  # assumes that all peak at once
    }))  # fmt: skip


def make_generations(folder: Path, rows: int, rows_per_part: int) -> float:
    """Write the parts to `folder`; return the mean length of a completion in characters."""
    draw = random.Random(0)
    texts = [make_text(draw) for _ in range(min(rows, DISTINCT_TEXTS))]
    characters = 0
    for number, first in enumerate(range(0, rows, rows_per_part)):
        count = min(rows_per_part, rows - first)
        completions = draw.choices(texts, k=count)
        characters += sum(map(len, completions))
        write_part(folder, LAYERS[number % len(LAYERS)], first, completions)
    return characters / rows


def write_part(folder: Path, layer: int, first: int, completions: list[str]) -> None:
    """Write one part with a row for each completion; `first` is the number of its first row."""
    count = len(completions)
    ids = [f"{first + index:016x}" for index in range(count)]
    alphas = [ALPHAS[index % len(ALPHAS)] for index in range(count)]
    same: dict[str, Any] = {
        "model": MODEL, "model_revision": None, "direction": "empathy", "direction_hash": "0" * 16, "layer": layer,
        "op": "add", "span": "all", "seed": 0, "prompt": "What do you do?", "thought": None, "finish_reason": "length",
        "prompt_tokens": 60, "completion_tokens": 200, "projection_prompt": 1.5, "projection_generated": 2.5,
        "projection_unsteered": 0.5, "log_likelihood": -1.25, "attempts": 1, "started_at": datetime.now(UTC),
        "seconds": 9.5, "error": None,
    }  # fmt: skip
    columns = {name: [value] * count for name, value in same.items()} | {
        "row_id": ids,
        "alpha": alphas,
        "alpha_residual_norm": [alpha / 100 for alpha in alphas],
        "alpha_separation": [alpha / 10 for alpha in alphas],
        "scenario": [list(MARKERS)[index // len(ALPHAS) % len(MARKERS)] for index in range(count)],
        "sample": list(range(count)),
        "completion": completions,
    }
    part = part_path(folder, MODEL, layer, ids)
    assert isinstance(part, Path)
    part.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=SCHEMA), part, compression="zstd")


def make_text(draw: random.Random) -> str:
    """Draw a completion: empty, a loop, or prose with five keywords of one kind."""
    kind = draw.random()
    if kind < 0.02:
        return ""
    if kind < 0.04:
        return " ".join(["move"] * WORDS_A_TEXT)
    keywords = EMPATHY_KEYWORDS if draw.random() < 0.5 else TASK_KEYWORDS
    words = draw.choices(PLAIN_TEXT.split(), k=WORDS_A_TEXT)
    for place in draw.sample(range(WORDS_A_TEXT), k=5):
        words[place] = draw.choice(keywords)
    return "".join(word + ("." if draw.random() < 0.08 else "") + " " for word in words)


if __name__ == "__main__":
    main()
