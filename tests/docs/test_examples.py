"""The examples run on a tiny random model; the one that talks to a server: test_server_blocks.py."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from tests.docs.blocks import ROOT
from tests.docs.conftest import save_kind
from tests.support.tiny_models import HIDDEN_SIZE

EXAMPLES = ROOT / "examples"
RUN_HERE = ("steer", "read", "ways_to_steer", "mixed_batch", "own_direction_file", "study_from_python")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    assert name in RUN_HERE
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_run_by_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUN_HERE, "server_openai"}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("started_engine")
class TestOnOneEngine:
    def test_the_projection_follows_alpha(
        self, deep_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("steer", monkeypatch, deep_model, "--max-tokens", 8)
        projections = [float(found) for found in re.findall(r"projection +(-?[\d.]+)", capsys.readouterr().out)]
        assert len(projections) == 3
        assert projections == sorted(projections)

    def test_texts_are_read_and_one_is_traced(
        self, deep_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("read", monkeypatch, deep_model, "I am so sorry.", "Noted.")
        printed = capsys.readouterr().out
        assert len(re.findall(r"tokens  norm +\d", printed)) == 2
        assert len(printed.splitlines()) > 4  # a line for each token of the first text

    def test_a_mixed_batch_reads_what_was_asked_and_nothing_else(
        self, deep_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("mixed_batch", monkeypatch, deep_model, "--max-tokens", 8)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("}")]
        assert [line.endswith("{}") for line in lines] == [True] * 6 + [False] * 2

    def test_only_answers_to_prompts_above_the_bound_differ_from_unsteered_ones(
        self, deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        figure = tmp_path / "ways.svg"
        # Five tokens, at which no answer has ended: all steps have the same shapes, and so the same last bits.
        run("ways_to_steer", monkeypatch, deep_model, "--earlier-layer", 12, "--max-tokens", 5, "--figure", figure)
        printed = capsys.readouterr().out
        bound = float(found[1]) if (found := re.search(r"^bound: (.+)$", printed, re.MULTILINE)) else math.nan
        for kind in ("distressed", "neutral"):
            [values] = re.findall(rf"^distress of the {kind} prompts: (.+)$", printed, re.MULTILINE)
            below = sum(float(value) <= bound for value in values.split())
            unchanged = dict(re.findall(rf"^(\w+) +{kind} .* as plain (\d)/4", printed, re.MULTILINE))
            assert unchanged == {"plain": "4", "response": "0", "clamp": ANY, "conditional": str(below), "stop": "0"}
        assert figure.read_text(encoding="utf-8").count("projection onto empathy") == 5

    @pytest.mark.parametrize("ending", ["npy", "safetensors"])
    def test_a_file_of_ones_own_steers(
        self,
        ending: str,
        deep_model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = tmp_path / f"mine.{ending}"
        if ending == "npy":
            np.save(file, np.random.default_rng(2).standard_normal(HIDDEN_SIZE))
        else:
            save_kind(file, "mine")
        layer = ("--layer", 16) if ending == "npy" else ()
        run("own_direction_file", monkeypatch, deep_model, file, "--name", "mine", *layer, "--max-tokens", 4)
        assert len(re.findall(r"^alpha ", capsys.readouterr().out, re.MULTILINE)) == 3

    def test_a_study_runs_from_python(
        self, deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("study_from_python", monkeypatch, deep_model, "--out", tmp_path / "run", "--samples", 2, "--max-tokens", 8)
        assert "6 rows generated, 0 reused" in capsys.readouterr().out
        assert (tmp_path / "run" / "report.html").stat().st_size > 0
        assert json.loads((tmp_path / "run" / "validation.json").read_text(encoding="utf-8"))["best_layer"] == 16
