"""`vllm-steer lm-eval` and `vllm-steer evaluate` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harnesses.conftest import ALPHA, ENGINE, PACKAGES, PROJECT, PROMPTS, Task

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# lm-eval is found behind the project's own packages
COMMAND = (
    sys.executable,
    "-c",
    f"import sys; sys.path.append({str(PACKAGES)!r}); from batch_jobs.cli.command import main; main()",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)


def test_lm_evals_command_line_is_steered_by_model_args(
    model: Path, directions: Path, choice: Task, generation: Task, tmp_path: Path
) -> None:
    for task in (choice, generation):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    args = {"pretrained": str(model), "directions": str(directions), "steering": f"kind:{ALPHA}", **ENGINE}
    options = [
        "--model_args",
        json.dumps(args),
        "--tasks",
        str(tmp_path / "choice.yaml"),
        str(tmp_path / "generation.yaml"),
    ]
    done = run("lm-eval", *options, "--output_path", str(tmp_path / "out"), "--log_samples")
    assert done.returncode == 0, done.stderr
    [results] = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["model"] == "vllm-steer"
    assert [entry["alpha"] for entry in config["steering"]] == [ALPHA]
    [samples] = (tmp_path / "out").rglob("samples_generation_*.jsonl")
    assert len(samples.read_text().splitlines()) == len(PROMPTS)


def test_a_wrong_setting_is_one_line_and_exit_code_2(model: Path, tmp_path: Path) -> None:
    done = run("lm-eval", "--model_args", json.dumps({"pretrained": str(model), "steering": ""}), "--tasks", "none")
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    done = run("evaluate", str(tmp_path / "none.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vllm-steer: ")
    assert done.stderr.count("\n") == 1


def test_the_help_is_lm_evals() -> None:
    done = run("lm-eval", "--help")
    assert done.returncode == 0
    assert (
        "lm-eval run --model" in done.stdout or "Available commands" in done.stdout or "usage: lm-eval" in done.stdout
    )
