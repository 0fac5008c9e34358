"""`study check` on studies that can and cannot run, without an engine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from batch_jobs.cli.main import app
from batch_jobs.config.study import load_study
from batch_jobs.design.estimate import (
    READING_SPEEDUP,
    START_SECONDS,
    Rate,
    Work,
    earlier_rate,
    parameter_count,
    seconds,
)
from batch_jobs.design.print_check import print_check
from batch_jobs.design.study_check import StudyCheck, check_study
from batch_jobs.engine.start_engine import text_config
from batch_jobs.texts.contrastive import load_scenarios
from tests.support.tiny_configs import HIDDEN_SIZE as SIZE
from tests.support.tiny_study import PROJECT_ROOT, write_study
from vllm_steer import Direction, save_directions

PAIRS = 6
"""Few, since a check compares all words of all texts; one test has the bundled 50."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    place = tmp_path_factory.mktemp("checked")
    bundled = (PROJECT_ROOT / "batch_jobs/data/pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (place / "few.jsonl").write_text("".join(bundled[::8][:PAIRS]), encoding="utf-8")
    write_study(place, demo_model, pairs=str(place / "few.jsonl"), split={"train": 4, "test": 2})
    return place


def changed(folder: Path, target: Path, **changes: Any) -> Path:
    document = yaml.safe_load((folder / "tiny.yaml").read_text(encoding="utf-8"))
    steer = {**document["steer"], **changes.pop("steer", {})}
    config = target / "tiny.yaml"
    config.write_text(yaml.safe_dump({**document, "steer": steer, **changes}), encoding="utf-8")
    return config


def checked(config: Path, **options: Any) -> StudyCheck:
    return check_study(load_study(config), runs=config.parent / "runs", **options)


def shown(check: StudyCheck) -> str:
    out = io.StringIO()
    print_check(check, Console(file=out, width=120))
    return out.getvalue()


def test_a_study_that_can_run_is_told_as_it_will_run(folder: Path, tmp_path: Path) -> None:
    primary = {"direction": "empathy", "layer": 2}
    config = changed(folder, tmp_path, steer={"controls": {"random": 3}}, primary=primary, pairs=None, split={})
    check = checked(config, tokens_per_second=100.0)
    assert check.problems == ()
    assert check.exit_code == 0
    assert check.work is not None
    # two layers, two scenarios, four samples: unsteered once, and at two α with the direction and its three controls
    assert (check.work.rows, check.work.control_rows) == (2 * 2 * 4 * (1 + 2 * 4), 2 * 2 * 4 * 2 * 3)
    assert check.work.new_tokens == 48 * check.work.rows
    text = shown(check)
    first, second = check.study.steer.scenarios
    assert check.prompts is not None
    (shown_whole,), (shown_cut,) = check.prompts[first], check.prompts[second]
    assert shown_whole.text in text  # with the chat template's marks
    assert "<|im_start|>assistant" in shown_whole.text
    assert load_scenarios(None)[first].objective in shown_whole.text
    assert shown_cut.text[:150] in text
    assert shown_cut.text not in text
    for part in (
        "train: 35 positive and 35 negative texts (food_delivery 7",
        "a bag of words tells the sides apart",
        "layers [1, 2] steered",
        "empathy, 3 random controls of each",
        "primary hypothesis: a positive delta, empathy at layer 2, the_listener, the_maze",
        "100 tokens a second, reading 4 times as fast (--tokens-per-second)",
        "the trend over α",
        "Nothing stands in the way of a run.",
    ):
        assert part in text


def test_tokens_to_read_are_texts_prompts_and_completions_read_again(folder: Path, tmp_path: Path) -> None:
    with_reading = checked(changed(folder, tmp_path, steer={"controls": {"random": 3}}))
    without = checked(changed(folder, tmp_path, steer={"controls": {"random": 3}}, likelihood=False))
    assert with_reading.work is not None
    assert without.work is not None
    assert with_reading.prompts is not None
    prompts = [len(prompt.token_ids) for several in with_reading.prompts.values() for prompt in several]
    # two layers and four samples, unsteered and at two α; the controls' completions are not read again
    assert with_reading.work.read_tokens - without.work.read_tokens == 2 * 4 * 3 * (sum(prompts) + 2 * 48)
    # the texts are cut to 64 tokens; 6 pairs and 2 ablated copies are read under two poolings
    texts = without.work.read_tokens - 2 * 4 * 9 * sum(prompts)
    assert 2 * 14 * 40 < texts <= 2 * 14 * 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extract": {"layers": [1, 2, 99], "max_tokens": 64}}, r"extract.layers [99] do not exist"),
        ({"max_model_len": 200}, "exceed max_model_len 200"),
        ({"steer": {"scenarios": ["the_moon"]}}, "['the_moon'] are unknown"),
        ({"pairs": "none.jsonl"}, "none.jsonl: cannot be read"),
        ({"split": {"train": 3, "test": 2}}, "holds 6 pairs, but the split asks for 3 + 2"),
        ({"model": "./nothing"}, "no model folder ./nothing"),
        ({"steer": {"directions": [{"file": "none.npy", "name": "mine"}]}}, "no direction file"),
    ],
)
def test_what_would_stop_a_run_is_a_problem(folder: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    check = checked(changed(folder, tmp_path, **changes))
    assert any(said in problem for problem in check.problems)
    assert check.exit_code == 1
    assert f"problem  {check.problems[0]}" in shown(check)


def test_all_problems_are_found_at_once(folder: Path, tmp_path: Path) -> None:
    check = checked(changed(folder, tmp_path, max_model_len=200, pairs="none.jsonl", steer={"layers": [1, 2]}))
    assert len(check.problems) == 1 + 2  # the pairs, and both prompts


def test_duplicate_texts_are_a_problem(folder: Path, tmp_path: Path) -> None:
    pairs = [
        {"scenario_id": "s", "positive": f"I am sorry, friend number {number % 3}.", "negative": f"Unit {number} done."}
        for number in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    check = checked(changed(folder, tmp_path, pairs="pairs.jsonl", split={"train": 3, "test": 1}))
    assert any(problem.startswith("Duplicate: ") for problem in check.problems)


def test_a_direction_of_a_file_is_shown_and_another_models_refused(folder: Path, tmp_path: Path) -> None:
    for name, size in (("mine", SIZE), ("wide", SIZE + 1)):
        vectors = [Direction("kind", layer, 3 * np.eye(size)[layer]) for layer in (1, 2)]
        save_directions(tmp_path / f"{name}.safetensors", vectors)
    entry = {"file": "mine.safetensors", "name": "mine"}
    text = shown(checked(changed(folder, tmp_path, steer={"directions": [entry]})))
    assert "mine@2 from a file, made a unit vector; its length there is 3" in text
    check = checked(changed(folder, tmp_path, steer={"directions": [entry | {"file": "wide.safetensors"}]}))
    assert any(f"{SIZE + 1} numbers wide" in problem for problem in check.problems)


def test_the_rate_is_the_latest_runs_of_this_model_and_else_a_rough_figure(folder: Path, tmp_path: Path) -> None:
    config = changed(folder, tmp_path)
    study, runs = load_study(config), tmp_path / "runs"
    assert earlier_rate(study, runs) is None
    rough = checked(config).rate
    assert rough is not None
    assert "a rough figure" in rough.source
    same = {"model": study.model, "dtype": study.dtype}
    for name, config_of, sessions in (
        ("a", same, [(1000, 10.0, "2026-01-01"), (None, None, "2026-03-03")]),
        ("b", same, [(900, 30.0, "2026-02-02")]),
        ("c", same | {"model": "other"}, [(9, 1.0, "2026-04-04")]),
    ):
        record = {
            "config": config_of,
            "sessions": [
                {"tokens_generated": tokens, "generation_seconds": taken, "finished_at": when}
                for tokens, taken, when in sessions
            ],
        }
        (runs / name).mkdir(parents=True)
        (runs / name / "provenance.json").write_text(json.dumps(record), encoding="utf-8")
    (runs / "broken").mkdir()
    (runs / "broken" / "provenance.json").write_text("{", encoding="utf-8")
    rate = checked(config).rate
    assert rate is not None
    assert rate.tokens_per_second == 30.0
    assert str(runs / "b") in rate.source


def test_the_time_is_start_tokens_and_reading() -> None:
    work = Work(rows=10, control_rows=0, new_tokens=1000, read_tokens=8000)
    assert seconds(work, Rate(100.0, "x")) == START_SECONDS + 10 + 8000 / (100 * READING_SPEEDUP)
    assert seconds(work, Rate(100.0, "x", includes_reading=True)) == START_SECONDS + 10


def test_parameters_are_counted_about_right(demo_model: Path) -> None:
    # SmolLM2-135M has 134.5 million
    assert parameter_count(text_config(str(demo_model))) == pytest.approx(134.5e6, rel=0.2)


def test_the_commands_print_and_exit_as_they_say(folder: Path, tmp_path: Path) -> None:
    good = CliRunner().invoke(
        app, ["study", "check", str(changed(folder, tmp_path)), "--out", str(tmp_path / "runs/x")]
    )
    assert good.exit_code == 0
    assert "Nothing stands in the way of a run." in good.output
    bad = CliRunner().invoke(app, ["study", "check", str(changed(folder, tmp_path, max_model_len=200))])
    assert bad.exit_code == 1
    power = CliRunner().invoke(app, ["study", "power", "--samples", "5", "--alphas", "8", "--scenarios", "3"])
    assert power.exit_code == 0
    assert "3 trends" in power.output
    assert "24 conditions" in " ".join(power.output.split())
    of_config = CliRunner().invoke(app, ["study", "power", str(changed(folder, tmp_path)), "--to", "0.9"])
    assert "4 samples at each of 3 levels" in of_config.output
    assert "from 0.3 to 0.9" in " ".join(of_config.output.split())
    nothing = CliRunner().invoke(app, ["study", "power", "--samples", "5"])
    assert "--alphas is missing" in str(nothing.exception)
