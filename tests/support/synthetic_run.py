"""The run directory of a study, made without an engine.

It holds readouts with a known shift and an attention sink, texts that turn kinder with α, a ceiling, a failed row and
hostile text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_jobs.config.study import Study
from batch_jobs.directions.readout_file import ReadoutKey, StudyReadouts
from batch_jobs.directions.validate_directions import validate_study
from batch_jobs.directions.validation_file import write_validation
from batch_jobs.scoring.behaviour import behaviour_points
from batch_jobs.scoring.block_outcomes import block_outcomes
from batch_jobs.scoring.compute_scores import decide, score_decided
from batch_jobs.scoring.direction_behaviour import direction_behaviours, write_behaviour
from batch_jobs.scoring.measures import measure_generations
from batch_jobs.scoring.scores_csv import write_scores
from batch_jobs.scoring.sign_and_layer_findings import make_findings, write_findings
from tests.support.made_pairs import made_split, read_texts

KIND = "I am sorry this is happening to you. I stop here, I listen, and I want to help you through it today."
COLD = "The objective is to win, so I complete the task on the optimal path before anything else can happen."
MIXED = "I could help them for a moment, yet the task is still there and both will have to share the afternoon."
LOOP = "move " * 60
HOSTILE = "<script>alert('x')</script> & <img src=http://evil.example/x> I listen, I am sorry, I care about you."
SCENARIOS = ("food_delivery", "the_listener", "the_protector")
IN_NORMS = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)
MEAN_NORM = {12: 142.0, 16: 180.0}
MARKERS = {"the_listener": ["listen", "sorry"], "food_delivery": ["path", "today"]}
SAMPLES = 5
PAIRS = made_split(35, 15, scenarios=SCENARIOS, writers=("writer-a", "writer-b"), telling=0.8)


def study(**changes: Any) -> Study:
    """The study of the synthetic run, with ``changes`` to its config."""
    return Study.model_validate(
        {
            "name": "synthetic",
            "model": "demo-model",
            "skip_first": 1,
            "extract": {"layers": [8, 12, 16, 20, 24]},
            "validation": {"all_layers": True, "random_directions": 100, "bootstrap": 200},
            "steer": {"layers": [12, 16], "alphas": IN_NORMS, "alpha_unit": "residual_norm", "scenarios": SCENARIOS},
        }
        | changes
    )


def readouts(num_blocks: int = 30) -> StudyReadouts:
    """Readouts that separate best at block 16; in the plain mean an attention sink drowns blocks 11 to 14."""
    rng = np.random.default_rng(0)
    counts = {"train_positive": 35, "train_negative": 35, "test_positive": 15, "test_negative": 15}
    counts["test_positive_ablated"] = 15
    arrays = {}
    for block in range(num_blocks):
        towards = np.zeros(32)
        towards[block % 32] = 1.0
        shift = 3.6 - 0.16 * abs(block - 16)
        for name, count in counts.items():
            strength = 0.0 if "negative" in name else shift * (0.9 if "ablated" in name else 1.0)
            noise = rng.normal(0.0, 1.0 + block / 15, (count, 32))
            sink = rng.normal(0.0, 9.0, (count, 1)) * towards if 11 <= block <= 14 else 0.0
            apart = (noise + strength * towards * (1.0 + block / 15)).astype(np.float32)
            arrays[ReadoutKey(name, 1, block)] = apart  # type: ignore[arg-type]
            arrays[ReadoutKey(name, 0, block)] = (apart + sink).astype(np.float32)  # type: ignore[arg-type]
    return StudyReadouts(read_texts(PAIRS, num_tokens=300, replacements=[12] * 15), arrays)


def generation(scenario: str, in_norms: float, sample: int, layer: int = 16, **changes: Any) -> dict[str, Any]:
    """One row. The larger α, the more samples are kind; The Listener starts at the ceiling; strong negative α loops."""
    kind = (scenario == "the_listener" and in_norms >= 0) or sample < 2 + 8 * in_norms * (1.0 if layer == 16 else 0.5)
    text = LOOP if in_norms <= -0.4 and sample % 2 else KIND if kind else MIXED if sample == 4 else COLD
    alpha = in_norms * MEAN_NORM[layer]
    along = {KIND: 9.0, MIXED: 6.0, COLD: 3.0, LOOP: 2.0}[text] + 0.7 * sample - 0.2 * layer
    return {
        "row_id": f"{scenario}{layer}{in_norms}{sample}", "model": "demo-model", "model_revision": None,
        "direction": "empathy", "direction_hash": "ab" * 32, "layer": layer, "op": "add", "span": "all",
        "alpha": alpha, "alpha_residual_norm": in_norms, "scenario": scenario, "sample": sample, "seed": sample,
        "prompt": f"You deliver food.\n\nSomebody in {scenario} needs help.\n\nWhat do you do?",
        "completion": text, "finish_reason": "stop", "prompt_tokens": 40, "completion_tokens": 25,
        "projection_prompt": 3.0, "projection_generated": along + 1.1 * alpha, "projection_unsteered": along,
        "log_likelihood": -1.2 - 4.0 * abs(in_norms), "attempts": 1, "seconds": 1.0, "error": None,
    } | changes  # fmt: skip


def demo_rows(layers: Sequence[int] = (16,)) -> list[dict[str, Any]]:
    """Rows of every scenario and α, one of them hostile, one empty and one failed."""
    rows = [
        generation(scenario, in_norms, sample, layer)
        for layer in layers
        for scenario in SCENARIOS
        for in_norms in IN_NORMS
        for sample in range(SAMPLES)
    ]
    rows[0] |= {"completion": HOSTILE}
    rows[6] |= {"completion": "", "projection_generated": None, "projection_unsteered": None, "log_likelihood": None}
    rows[8] |= {
        "completion": None, "finish_reason": None, "completion_tokens": None, "projection_generated": None,
        "projection_unsteered": None, "log_likelihood": None, "error": "<b>out</b>",
    }  # fmt: skip
    return rows


def write_run(
    folder: Path, rows: list[dict[str, Any]], *, config: dict[str, Any] | None = None, of: Study | None = None
) -> Path:
    """Write all that a report reads: validation, generations in two parts and one half-written, scores, findings,
    behaviour, provenance. `config` stands in for the study's own in the provenance."""
    of = of or study()
    validation = validate_study(of, readouts(), PAIRS)
    if config is not None:
        validation.extra.pop("extract_offset")
    write_validation(folder / "validation.json", validation)
    schema = pa.Table.from_pylist(rows).schema
    place = folder / "generations" / "model_key=demo-model" / "layer_key=16"
    place.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2
    for index, part in enumerate((rows[:half], rows[half:])):
        pq.write_table(pa.Table.from_pylist(part, schema=schema), place / f"part-{index}.parquet")
    (place / ".part-2.parquet").write_bytes(b"half a file")
    measures = decide(measure_generations(folder / "generations", MARKERS, processes=1))
    scores = score_decided(measures)
    write_scores(folder / "scores.csv", scores)
    write_findings(folder / "findings.json", make_findings(scores, validation, block_outcomes(measures)))
    write_behaviour(folder / "behaviour.json", direction_behaviours(behaviour_points(folder / "generations")))
    document = {"config": of.model_dump(mode="json") if config is None else config, "versions": {"vllm": "0.32.0"}}
    (folder / "provenance.json").write_text(json.dumps(document), encoding="utf-8")
    return folder
