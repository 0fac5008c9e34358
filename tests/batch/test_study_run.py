"""`vllm-steer study run` as a user calls it: the real command, the real engine, the demo model, a smaller grid."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import yaml

from vllm_steer import load_directions

PROJECT_ROOT = Path(__file__).resolve().parents[2]
ALPHAS = [-0.3, 0.0, 0.3]
SAMPLES = 2


def _study(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from batch_jobs.cli.main import main; main()",
        "study",
        "run",
        str(config),
        "--out",
        str(out),
    ]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("demo_model")
def test_a_study_runs_from_texts_to_report_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    study = yaml.safe_load((PROJECT_ROOT / "configs/studies/demo.yaml").read_text(encoding="utf-8"))
    study["dtype"] = "float32"  # bfloat16 takes minutes on a CPU that has no instructions for it
    study["extract"]["layers"] = [8, 16]
    study["steer"] |= {"layers": [16], "alphas": ALPHAS, "scenarios": ["the_listener"], "samples": SAMPLES}
    study["steer"]["controls"] = {"random": 1}
    study["primary"] = {"direction": "empathy", "layer": 16}
    study["sampling"]["max_tokens"] = 24
    study["split"] = {"train": 10, "test": 5, "seed": 0}
    study["validation"] = {"random_directions": 20, "bootstrap": 200}
    study["pairs"] = "pairs.jsonl"
    bundled = (PROJECT_ROOT / "batch_jobs/data/pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(bundled[::3][:15]), encoding="utf-8")
    config, out = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(study), encoding="utf-8")

    first = _study(config, out)
    assert first.returncode == 0, first.stderr[-4000:]

    validation = json.loads((out / "validation.json").read_text(encoding="utf-8"))
    assert set(validation["layers"]) == {"8", "16"}
    assert max(layer["auroc"] for layer in validation["layers"].values()) >= 0.9
    directions = load_directions(out / "directions.safetensors")
    assert all(one.is_unit for one in directions)
    names = ("empathy", "empathy-logistic-regression", "empathy-pca")
    assert {(one.name, one.layer) for one in directions} == {(name, layer) for name in names for layer in (8, 16)}
    rows = ds.dataset(out / "generations", format="parquet").to_table().to_pylist()
    controls = [row for row in rows if row["direction"] == "empathy.control0"]
    rows = [row for row in rows if row["direction"] == "empathy"]
    assert len(rows) == len(ALPHAS) * SAMPLES
    assert len(controls) == (len(ALPHAS) - 1) * SAMPLES
    assert all(
        row["alpha"] == pytest.approx(row["alpha_residual_norm"] * validation["mean_residual_norms"]["16"])
        for row in [*rows, *controls]
    )
    # A control pushes as far in another direction: the projection onto the concept's hardly moves, the texts differ.
    steered = {(row["alpha_residual_norm"], row["sample"]): row for row in rows}
    for row in controls:
        twin = steered[row["alpha_residual_norm"], row["sample"]]
        assert (row["seed"], row["prompt"], row["alpha_separation"]) == (
            twin["seed"], twin["prompt"], twin["alpha_separation"],
        )  # fmt: skip
        assert row["completion"] != twin["completion"]
        assert row["projection_prompt"] == twin["projection_prompt"]
        assert (row["log_likelihood"], row["projection_unsteered"]) == (None, None)
    top = max(ALPHAS)
    moved = {
        name: sum(row["projection_generated"] for row in which if row["alpha_residual_norm"] == top)
        - sum(row["projection_generated"] for row in which if row["alpha_residual_norm"] == -top)
        for name, which in (("direction", rows), ("control", controls))
    }
    # α itself, twice, is part of the direction's own projection alone; both carry what the texts say
    assert moved["direction"] / SAMPLES > 2 * top * validation["mean_residual_norms"]["16"] * 0.75
    assert abs(moved["control"]) < moved["direction"] / 2
    record = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    assert record["primary"]["stated_at"] <= record["finished_at"]
    assert record["sessions"][0]["tokens_generated"] == sum(row["completion_tokens"] for row in [*rows, *controls])
    # The readout is taken after steering, so the stream's projection carries α itself.
    by_alpha = [
        sum(row["projection_generated"] for row in rows if row["alpha_residual_norm"] == alpha) for alpha in ALPHAS
    ]
    assert by_alpha == sorted(by_alpha)
    # The unsteered model's log-probability of the text is finite and below zero.
    assert all(row["log_likelihood"] < 0 and math.isfinite(row["projection_unsteered"]) for row in rows)
    for name in ("scores.csv", "findings.json", "behaviour.json", "report.html", "provenance.json"):
        assert (out / name).stat().st_size > 0
        assert str(out / name).replace("\n", "") in first.stdout.replace("\n", "")

    again = _study(config, out)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "0 rows generated" in again.stdout
    assert "Engine started" not in again.stderr
