from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_steer import load_directions

ROOT = Path(__file__).resolve().parents[3]
RUN = "import sys; from batch_jobs.cli.main import main; sys.argv[0] = 'vllm-steer'; main()"


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
    heavy = "import sys, batch_jobs.cli.main; print({'vllm', 'torch', 'ray', 'pyarrow', 'sklearn'} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert loaded.stdout.strip() == "set()"


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    failed = vllm_steer("study", "run", str(tmp_path / "none.yaml"))
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"vllm-steer: {tmp_path / 'none.yaml'}: cannot be read")
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


def test_options_of_the_pool_are_refused_without_the_pool(tmp_path: Path) -> None:
    failed = vllm_steer("study", "run", "configs/studies/demo.yaml", "--workers", "2", "--out", str(tmp_path / "out"))
    assert failed.returncode == 2
    assert "add --executor ray" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_converted_directions_are_the_same(tmp_path: Path) -> None:
    vector = np.linspace(-1, 1, 64, dtype=np.float32)
    np.save(tmp_path / "kind.npy", vector)
    there = vllm_steer(
        "convert", str(tmp_path / "kind.npy"), str(tmp_path / "kind.gguf"), "--name", "kind", "--layer", "12"
    )
    back = vllm_steer("convert", str(tmp_path / "kind.gguf"), str(tmp_path / "kind.safetensors"))
    key, digest, norm, *about = there.stdout.split()
    assert back.stdout.split() == [key, digest, norm], "a .gguf file keeps no metadata"
    assert (key, about) == ("kind@12", ["writer=numpy", "layer_index=block_output"])
    (direction,) = load_directions(tmp_path / "kind.safetensors")
    assert np.array_equal(direction.vector, vector)


def test_published_generations_are_scored_by_the_command(paper_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    done = vllm_steer("score", "--raw", str(paper_data / "steering" / "qwen2.5-7b.json"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    published = (paper_data / "steering" / "qwen2.5-7b_success.csv").read_text(encoding="utf-8").splitlines()
    ours = [",".join(line.split(",")[:6]) for line in out.read_text(encoding="utf-8").splitlines()]
    assert ours == published


def test_the_pairs_check_says_what_gives_the_bundled_pairs_away() -> None:
    done = vllm_steer("pairs", "check")
    assert done.returncode == 0, done.stderr
    assert "Lexical baseline" in done.stdout


def test_the_pairs_of_a_study_are_checked_with_its_concepts_keywords() -> None:
    done = vllm_steer("pairs", "check", "--config", "configs/studies/formality.yaml")
    assert done.returncode == 0, done.stderr
    assert "AUROC of informal keywords alone" in done.stdout
    assert "empath" not in done.stdout
    assert "No problems found." in done.stdout
