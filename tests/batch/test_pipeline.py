"""The order of a study's steps and what a second run reuses, with an engine that answers from a formula."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import vllm_steer
from batch_jobs.pipeline import StudyResult, run_study
from batch_jobs.run_directory import RunDirectory
from batch_jobs.store import read_rows
from batch_jobs.study import Study, StudyError
from vllm_steer import Direction, Readout, ReadoutResult, Steering

HIDDEN = 8
KIND, COLD = "I am sorry and want to help and listen. ", "I win the task. "


class FormulaEngine:
    """Reads a text's projection off the share of its letters h, and writes kindly where α is positive."""

    def __init__(self) -> None:
        self.chat_template = "{{ messages }}"
        self.batches: list[list[SimpleNamespace]] = []
        self.fail_next_row = False

    def get_tokenizer(self) -> FormulaEngine:
        return self

    def __call__(self, text: str, *, truncation: bool = False, max_length: int = 10**9, **_: Any) -> Any:
        return {"input_ids": [ord(letter) for letter in text][:max_length]}

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> str:
        return f"<user>{messages[0]['content']}<assistant>"

    def get_metrics(self) -> list[Any]:
        return []

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        self.batches.append(list(params))
        outputs = []
        for prompt, wanted in zip(prompts, params, strict=True):
            alpha = sum(entry.alpha for entry in wanted.steering)
            text = (KIND if alpha > 0 else COLD) * 8
            completion = SimpleNamespace(text=text, token_ids=[1] * 40, finish_reason="length")
            outputs.append(
                SimpleNamespace(
                    prompt_token_ids=prompt["prompt_token_ids"],
                    wanted=wanted,
                    outputs=[completion],
                    metrics=SimpleNamespace(arrival_time=1.7e9, scheduled_ts=1.0, last_token_ts=3.5),
                )
            )
        if self.fail_next_row and len(outputs) > 3:
            self.fail_next_row = False
            outputs[3].outputs[0].finish_reason = "abort"
        return outputs


def readout_of(output: Any) -> list[ReadoutResult]:
    ids = output.prompt_token_ids
    vector = np.full(HIDDEN, 0.5, dtype=np.float32)
    vector[1] = sum(token == ord("h") for token in ids) / len(ids)
    layers, names = output.wanted.readout.layers, output.wanted.readout.project
    projections = {name: dict.fromkeys(layers, float(vector[1])) for name in names}
    return [ReadoutResult(dict.fromkeys(layers, vector), len(ids), projections)]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    made = FormulaEngine()

    def steered(fields: Any, entries: list[Steering], readout: Readout) -> Any:
        return SimpleNamespace(fields=fields, steering=entries, readout=readout)

    def register(llm: Any, directions: list[Direction]) -> None:
        assert all(abs(direction.norm - 1) < 1e-6 for direction in directions)

    stand_ins = {
        "load_llm": lambda *_, **__: made,
        "steered": steered,
        "register_directions": register,
        "collect_readouts": lambda _, outputs: [readout_of(output) for output in outputs],
    }
    for name, stand_in in stand_ins.items():
        # into the namespace itself: looking the real one up first, as setattr does, would import vLLM
        monkeypatch.setitem(vars(vllm_steer), name, stand_in)
    return made


def make_study(**changes: Any) -> Study:
    document = {
        "name": "small",
        "model": "owner/model",
        "extract": {"layers": [2, 3]},
        "steer": {"layers": [3], "alphas": [-1, 0, 1], "scenarios": ["the_duel", "the_maze"], "samples": 2},
        "skip_first": 1,
        "rows_per_part": 8,
    }
    return Study.model_validate({**document, **changes})


def run(study: Study, folder: Path, *, overwrite: bool = False) -> StudyResult:
    return run_study(study, RunDirectory(folder), overwrite=overwrite, console=Console(quiet=True))


def test_a_study_leaves_every_result_and_scores_it(engine: FormulaEngine, tmp_path: Path) -> None:
    result = run(make_study(), tmp_path)
    assert (result.generated, result.reused) == (12, 0)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"directions.safetensors", "validation.json", "generations", "scores.csv"}
    assert written >= {"report.html", "provenance.json"}
    rates = {(row.scenario, row.alpha): row.empathy_rate for row in result.scores.conditions}
    assert rates == {(name, alpha): float(alpha > 0) for name in ("the_duel", "the_maze") for alpha in (-1, 0, 1)}
    validation = json.loads((tmp_path / "validation.json").read_text(encoding="utf-8"))
    assert set(validation["layers"]) == {"2", "3"}
    assert validation["mean_residual_norm"]["3"] > 0
    record = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert record["direction_hashes"] == validation["direction_hash"]
    assert record["rows_failed"] == 0


def test_texts_are_read_in_one_batch_and_rows_in_batches_of_mixed_conditions(
    engine: FormulaEngine, tmp_path: Path
) -> None:
    run(make_study(), tmp_path)
    texts, prompts, *rows = engine.batches
    assert len(texts) == 100
    assert texts[0].readout == Readout(layers=(2, 3), span="prompt", skip_first=1)
    assert len(prompts) == 2
    assert [len(batch) for batch in rows] == [8, 4]
    assert len({tuple(params.steering) for params in rows[0]}) == 3


def test_the_baseline_carries_no_steering_and_other_rows_exactly_theirs(engine: FormulaEngine, tmp_path: Path) -> None:
    run(make_study(), tmp_path)
    table = read_rows(tmp_path / "generations").to_pylist()
    params = [params for batch in engine.batches[2:] for params in batch]
    assert sum(not wanted.steering for wanted in params) == sum(row["alpha"] == 0 for row in table) == 4
    assert {tuple(wanted.steering) for wanted in params} == {
        (), (Steering("empathy", -1.0, layer=3),), (Steering("empathy", 1.0, layer=3),)
    }  # fmt: skip
    assert all(wanted.readout.span == "generated" and not wanted.readout.vectors for wanted in params)
    assert {wanted.fields["seed"] for wanted in params} == {row["seed"] for row in table}
    assert all(row["prompt"].startswith("<user>") and row["seconds"] == 2.5 for row in table)


def test_a_finished_study_runs_nothing_again(engine: FormulaEngine, tmp_path: Path) -> None:
    first = run(make_study(), tmp_path)
    batches = len(engine.batches)
    again = run(make_study(), tmp_path)
    assert len(engine.batches) == batches
    assert (again.generated, again.reused) == (0, 12)
    assert again.scores == first.scores


def test_a_study_cut_short_generates_only_what_is_missing(engine: FormulaEngine, tmp_path: Path) -> None:
    run(make_study(), tmp_path)
    before = (tmp_path / "directions.safetensors").read_bytes()
    parts = sorted((tmp_path / "generations").rglob("*.parquet"))
    parts[0].unlink()
    again = run(make_study(), tmp_path)
    assert again.generated in (4, 8)
    assert again.generated + again.reused == 12
    assert read_rows(tmp_path / "generations").num_rows == 12
    assert (tmp_path / "directions.safetensors").read_bytes() == before


def test_a_failed_row_is_counted_and_run_again_next_time(engine: FormulaEngine, tmp_path: Path) -> None:
    study = make_study(rows_per_part=1024)
    original = engine.generate

    def lose_one(prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        engine.fail_next_row = len(prompts) == 12
        return original(prompts, params, use_tqdm=use_tqdm)

    engine.generate = lose_one  # type: ignore[method-assign]
    first = run(study, tmp_path)
    assert sum(row.failed for row in first.scores.conditions) == 1
    errors = read_rows(tmp_path / "generations")["error"].to_pylist()
    assert [error for error in errors if error] == ["the engine ended the row with finish_reason 'abort'"]
    again = run(study, tmp_path)
    assert (again.generated, again.reused) == (1, 11)
    assert sum(row.failed for row in again.scores.conditions) == 0


def test_another_config_needs_its_own_place_or_overwrite(engine: FormulaEngine, tmp_path: Path) -> None:
    run(make_study(), tmp_path)
    with pytest.raises(StudyError, match="--overwrite"):
        run(make_study(seed=1), tmp_path)
    assert run(make_study(seed=1), tmp_path, overwrite=True).generated == 12


def test_an_unknown_scenario_and_a_prompt_too_long_are_refused(engine: FormulaEngine, tmp_path: Path) -> None:
    steer = make_study().steer.model_dump()
    with pytest.raises(StudyError, match=r"\['the_moon'\] are unknown; allowed: food_delivery"):
        run(make_study(steer={**steer, "scenarios": ["the_moon"]}), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StudyError, match="max_model_len"):
        run(make_study(max_model_len=700), tmp_path)


def test_raw_prompts_are_the_text_alone(engine: FormulaEngine, tmp_path: Path) -> None:
    run(make_study(prompt_format="raw"), tmp_path)
    prompts = set(read_rows(tmp_path / "generations")["prompt"].to_pylist())
    assert all(prompt.endswith("\n\nWhat do you do?") and "<user>" not in prompt for prompt in prompts)
    engine.chat_template = ""
    with pytest.raises(StudyError, match="no chat template"):
        run(make_study(), tmp_path, overwrite=True)
