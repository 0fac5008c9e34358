from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from batch_jobs.cli import main; sys.argv[0] = 'vllm-steer'; main()"


def vllm_steer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    shown = vllm_steer("--help")
    assert shown.returncode == 0
    assert "study" in shown.stdout
    assert "demo-model" in shown.stdout
    heavy = "import sys, batch_jobs.cli; print({'vllm', 'torch', 'ray', 'pyarrow', 'sklearn'} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert loaded.stdout.strip() == "set()"


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    failed = vllm_steer("study", "run", str(tmp_path / "none.yaml"))
    assert failed.returncode == 2
    assert failed.stderr.startswith("vllm-steer: Cannot read the study config")
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""


@pytest.mark.parametrize("option", ["--pairs", "--scenarios"])
def test_texts_that_are_not_there_are_refused_before_any_engine_starts(tmp_path: Path, option: str) -> None:
    missing = tmp_path / "missing.json"
    out = tmp_path / "out"
    failed = vllm_steer("study", "run", "configs/studies/demo.yaml", option, str(missing), "--out", str(out))
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"vllm-steer: {missing}: cannot be read")
    assert not out.exists()
