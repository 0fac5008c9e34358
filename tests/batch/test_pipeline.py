"""The order of a study's steps, and their reuse by a second run, with an engine that answers from a formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from batch_jobs.config.concept import Concept, concept_of_run, empathy
from batch_jobs.config.primary import recorded_primary
from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.validation_file import read_validation
from batch_jobs.pipeline import RunOptions, StudyResult, not_judged_yet, run_study, score_run
from batch_jobs.rows.store import read_rows
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.primary_rows import primary_rows
from batch_jobs.texts.contrastive import load_scenarios, load_split
from tests.support.formula_engine import HIDDEN, FormulaEngine, install_for_studies, small_study
from vllm_steer import Direction, Readout, Steering, load_directions, save_directions

BLOCKS = 6
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    # drawing the figures takes longer than everything else here; tests/batch/report and test_study_run.py test them
    monkeypatch.setattr("batch_jobs.pipeline.write_report", lambda path: path)
    return install_for_studies(monkeypatch, BLOCKS)


def run(study: Study, folder: Path, **options: Any) -> StudyResult:
    return run_study(study, RunDirectory(folder), RunOptions(**options), console=Console(quiet=True))


def test_a_study_leaves_every_result_and_scores_it(engine: FormulaEngine, tmp_path: Path) -> None:
    result = run(small_study(), tmp_path)
    assert (result.generated, result.reused) == (12, 0)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"directions.safetensors", "validation.json", "generations", "scores.csv"}
    assert written >= {"scores_success.csv", "findings.json", "behaviour.json", "readouts.safetensors"}
    assert written >= {"provenance.json", "scenarios.json"}
    rates = {(row.scenario, row.alpha): row.empathy_rate for row in result.scores.conditions}
    assert rates == {(name, alpha): float(alpha > 0) for name in ("the_duel", "the_maze") for alpha in (-1, 0, 1)}
    validation = json.loads((tmp_path / "validation.json").read_text(encoding="utf-8"))
    assert set(validation["layers"]) == {"2", "3"}
    record = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    directions = load_directions(tmp_path / "directions.safetensors")
    assert record["direction_hashes"] == {one.key: one.content_hash for one in directions}
    assert record["rows_failed"] == 0


def test_texts_are_read_in_one_batch_and_rows_in_batches_of_mixed_conditions(
    engine: FormulaEngine, tmp_path: Path
) -> None:
    run(small_study(), tmp_path)
    texts, prompts, *_ = engine.batches
    # every text without its first token, the 15 positive test texts again with their words replaced, and every first
    # token once for the mean over all
    assert {params.readout for params in texts} == {
        Readout(layers=(2, 3), span="prompt", skip_first=skip) for skip in (0, 1)
    }
    assert sum(params.readout.skip_first for params in texts) == 100 + 15
    split = load_split(None, small_study().split)
    firsts = {text[0] for pair in (*split.train, *split.test) for text in (pair.positive, pair.negative)}
    assert len(texts) == 100 + 15 + len(firsts)
    assert len(prompts) == 2
    rows = engine.generated
    assert [len(batch) for batch in rows] == [8, 4]
    assert len({tuple(params.steering) for params in rows[0]}) == 3


def test_completions_are_read_once_more_without_steering_unless_it_is_switched_off(
    engine: FormulaEngine, tmp_path: Path
) -> None:
    run(small_study(), tmp_path / "with")
    again = [batch for batch in engine.batches if "prompt_logprobs" in batch[0].fields]
    # eight rows with two completions, which are read once each, and four with one
    assert [len(batch) for batch in again] == [2, 1]
    rows = read_rows(tmp_path / "with" / "generations").to_pylist()
    assert None not in {row["log_likelihood"] for row in rows}
    assert not any(params.steering for batch in again for params in batch)
    engine.batches.clear()
    run(small_study(likelihood=False), tmp_path / "without")
    assert not [batch for batch in engine.batches if "prompt_logprobs" in batch[0].fields]
    assert set(read_rows(tmp_path / "without" / "generations")["log_likelihood"].to_pylist()) == {None}


def test_several_kinds_of_direction_share_one_baseline(engine: FormulaEngine, tmp_path: Path) -> None:
    steer = {**small_study().steer.model_dump(), "directions": ["mean_difference", "pca"]}
    result = run(small_study(steer=steer), tmp_path)
    rows = read_rows(tmp_path / "generations").to_pylist()
    counts = {(row["direction"], row["alpha"]): 0 for row in rows}
    for row in rows:
        counts[row["direction"], row["alpha"]] += 1
    named = {("empathy", -1.0): 4, ("empathy", 0.0): 4, ("empathy", 1.0): 4}
    assert counts == {**named, ("empathy-pca", -1.0): 4, ("empathy-pca", 1.0): 4}
    assert {row.baseline_empathy_rate for row in result.scores.conditions} == {0.0}


def test_the_baseline_carries_no_steering_and_other_rows_exactly_theirs(engine: FormulaEngine, tmp_path: Path) -> None:
    run(small_study(), tmp_path)
    table = read_rows(tmp_path / "generations").to_pylist()
    params = [params for batch in engine.generated for params in batch]
    assert sum(not wanted.steering for wanted in params) == sum(row["alpha"] == 0 for row in table) == 4
    assert {tuple(wanted.steering) for wanted in params} == {
        (),
        (Steering("empathy", -1.0, layer=3),),
        (Steering("empathy", 1.0, layer=3),),
    }
    assert all(wanted.readout.span == "generated" and not wanted.readout.vectors for wanted in params)
    assert {wanted.fields["seed"] for wanted in params} == {row["seed"] for row in table}
    assert all(row["prompt"].startswith("<user>") and row["seconds"] == 2.5 for row in table)


def test_a_finished_study_runs_nothing_again(engine: FormulaEngine, tmp_path: Path) -> None:
    first = run(small_study(), tmp_path)
    batches = len(engine.batches)
    again = run(small_study(), tmp_path)
    assert len(engine.batches) == batches
    assert (again.generated, again.reused) == (0, 12)
    assert again.scores == first.scores


def test_the_validation_of_an_earlier_version_is_made_anew_without_an_engine(
    engine: FormulaEngine, tmp_path: Path
) -> None:
    first = run(small_study(), tmp_path)
    batches, path = len(engine.batches), tmp_path / "validation.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    earlier = {field: value for field, value in document.items() if field not in ("format", "layer_choice", "words")}
    path.write_text(json.dumps(earlier), encoding="utf-8")
    again = run(small_study(), tmp_path)
    assert len(engine.batches) == batches
    assert again.validation == first.validation
    assert json.loads(path.read_text(encoding="utf-8")) == document


def test_a_study_cut_short_generates_only_what_is_missing(engine: FormulaEngine, tmp_path: Path) -> None:
    run(small_study(), tmp_path)
    before = (tmp_path / "directions.safetensors").read_bytes()
    parts = sorted((tmp_path / "generations").rglob("*.parquet"))
    parts[0].unlink()
    again = run(small_study(), tmp_path)
    assert again.generated in (4, 8)
    assert again.generated + again.reused == 12
    assert read_rows(tmp_path / "generations").num_rows == 12
    assert (tmp_path / "directions.safetensors").read_bytes() == before


def test_a_failed_row_is_kept_until_it_is_asked_for_again(engine: FormulaEngine, tmp_path: Path) -> None:
    study = small_study(rows_per_part=1024)
    original = engine.answer

    def lose_one(prompt: Any, wanted: Any) -> Any:
        output = original(prompt, wanted)
        if wanted.steering and wanted.steering[0].alpha == 1 and wanted.fields["seed"] == min(seeds):
            output.outputs[0].finish_reason, output.outputs[0].stop_reason = "error", "its reason"
        seeds.add(wanted.fields.get("seed", 2**40))
        return output

    seeds = {2**40}
    engine.answer = lose_one  # type: ignore[method-assign]
    first = run(study, tmp_path)
    assert first.failed == 1
    assert sum(row.failed for row in first.scores.conditions) == 1
    failed = [row for row in read_rows(tmp_path / "generations").to_pylist() if row["error"]]
    assert [row["error"] for row in failed] == ["the engine ended the row with finish_reason 'error': its reason"]
    assert failed[0]["attempts"] == study.max_attempts
    engine.answer = original  # type: ignore[method-assign]
    same = run(study, tmp_path)
    assert (same.generated, same.reused, same.failed) == (0, 12, 1)
    again = run(study, tmp_path, retry_failed=True)
    assert (again.generated, again.reused, again.failed) == (1, 11, 0)
    assert sum(row.failed for row in again.scores.conditions) == 0


def test_another_config_needs_its_own_place_or_overwrite(engine: FormulaEngine, tmp_path: Path) -> None:
    run(small_study(), tmp_path)
    with pytest.raises(StudyError, match=r"seed: 0 -> 1.*--overwrite"):
        run(small_study(seed=1), tmp_path)
    assert run(small_study(seed=1), tmp_path, overwrite=True).generated == 12


def test_how_the_work_is_done_may_change_between_sessions(engine: FormulaEngine, tmp_path: Path) -> None:
    run(small_study(), tmp_path)
    again = run(small_study(rows_per_part=3, max_attempts=1, engine={"enforce_eager": True}), tmp_path)
    assert (again.generated, again.reused) == (0, 12)


def test_a_layer_the_model_lacks_is_refused_before_anything_runs(engine: FormulaEngine, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"\[6\] do not exist: owner/model has 6 decoder blocks; allowed: 0 to 5"):
        run(small_study(extract={"layers": [3, 6]}), tmp_path)
    assert not engine.batches
    assert not list(tmp_path.iterdir())


def test_scores_can_be_made_again_from_the_run_directory_alone(engine: FormulaEngine, tmp_path: Path) -> None:
    result = run(small_study(), tmp_path)
    directory = RunDirectory(tmp_path)
    written = directory.scores.read_bytes()
    directory.scores.unlink()
    scores = score_run(directory, load_scenarios(directory.scenarios), read_validation(directory.validation), empathy())
    assert scores == result.scores
    assert directory.scores.read_bytes() == written


OWN = {"name": "calm", "question": None, "keywords": {"positive": ["sorry"], "negative": ["win"], "match": "word"}}


def own_texts(folder: Path, **rubric: Any) -> dict[str, Any]:
    """A study's fields: a concept of its own and a scenario of three prompts."""
    place = folder / "own.json"
    scenario = {"id": "duel", "title": "D", "prompts": ["Write.", "Tell her.", "Say hush."], "markers": ["a"], **rubric}
    place.write_text(json.dumps([scenario]), encoding="utf-8")
    pairs = folder / "own.jsonl"
    pairs.write_text((PROJECT / "batch_jobs" / "data" / "pairs.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    steer = {"layers": [3], "alphas": [-1, 0, 1], "scenarios": ["duel"], "samples": 5}
    return {"pairs": pairs, "scenarios": place, "steer": steer, "concept": OWN}


def test_a_concept_of_ones_own_does_not_run_on_the_bundled_texts(engine: FormulaEngine, tmp_path: Path) -> None:
    fields = own_texts(tmp_path)
    for missing in (["pairs"], ["pairs", "scenarios"]):
        with pytest.raises(
            StudyError, match=f"'calm' and {' and '.join(missing)} not given; the bundled ones are about"
        ):
            run(small_study(**{name: value for name, value in fields.items() if name not in missing}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_concept_of_ones_own_names_the_directions_and_scores_the_rows(engine: FormulaEngine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(small_study(**own_texts(tmp_path)), out)
    assert {direction.name for direction in load_directions(out / "directions.safetensors")} >= {"calm", "calm-pca"}
    assert {row.alpha: row.empathy_rate for row in result.scores.conditions} == {-1.0: 0.0, 0.0: 0.0, 1.0: 1.0}
    concept = concept_of_run(RunDirectory(out).read_provenance())
    assert concept == Concept.model_validate(OWN)
    scores = score_run(RunDirectory(out), load_scenarios(out / "scenarios.json"), result.validation, concept)
    assert scores == result.scores


def test_the_prompts_of_a_scenario_take_turns_over_its_samples(engine: FormulaEngine, tmp_path: Path) -> None:
    run(small_study(**own_texts(tmp_path)), tmp_path / "out")
    rows = read_rows(tmp_path / "out" / "generations").to_pylist()
    order = ["Write.", "Tell her.", "Say hush.", "Write.", "Tell her."]
    assert {(row["sample"], row["prompt"]) for row in rows} == {
        (sample, f"<user>{text}<assistant>") for sample, text in enumerate(order)
    }
    # each prompt is read by itself: the formula gives other texts other projections
    assert len({row["projection_prompt"] for row in rows}) == 3
    assert all(row["prompt_tokens"] == len(row["prompt"]) for row in rows)


def test_a_judged_concept_has_no_rates_before_its_grades(engine: FormulaEngine, tmp_path: Path) -> None:
    out, judged = RunDirectory(tmp_path / "out"), {"name": "calm", "outcome": "judge"}
    with pytest.raises(StudyError, match=r"\['duel'\] have no rubric"):
        run(small_study(**own_texts(tmp_path) | {"concept": judged}), out.path)
    study = small_study(**own_texts(tmp_path, rubric=["no", "some", "full"]) | {"concept": judged})
    result = run(study, out.path)
    assert result.scores.success == ()
    note = not_judged_yet(out, study.concept, result.scores)
    assert note is not None
    assert f"vllm-steer study judge {out.path}" in note
    ids = read_rows(out.generations).select(["row_id", "alpha"]).to_pylist()
    grades = [{"row_id": row["row_id"], "grade": 2 if row["alpha"] > 0 else 0, "model": "m"} for row in ids]
    out.judgements.mkdir()
    (out.judgements / "m.jsonl").write_text("".join(json.dumps(grade) + "\n" for grade in grades), encoding="utf-8")
    scores = score_run(out, load_scenarios(out.scenarios), result.validation, study.concept)
    assert {row.alpha: row.empathy_rate for row in scores.conditions} == {-1.0: 0.0, 0.0: 0.0, 1.0: 1.0}
    assert not_judged_yet(out, study.concept, scores) is None


def test_an_unknown_scenario_and_a_prompt_too_long_are_refused(engine: FormulaEngine, tmp_path: Path) -> None:
    steer = small_study().steer.model_dump()
    with pytest.raises(StudyError, match=r"\['the_moon'\] are unknown; allowed: food_delivery"):
        run(small_study(steer={**steer, "scenarios": ["the_moon"]}), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StudyError, match="max_model_len"):
        run(small_study(max_model_len=700), tmp_path)


def test_texts_without_a_utf8_form_are_refused_before_anything_runs(engine: FormulaEngine, tmp_path: Path) -> None:
    pairs, scenarios, out = tmp_path / "pairs.jsonl", tmp_path / "scenarios.json", tmp_path / "out"
    pairs.write_text('{"scenario_id": "a", "empathic_text": "x", "non_empathic_text": "\\ud83d"}\n', encoding="utf-8")
    scenarios.write_text(json.dumps([{"id": "the_duel", "title": "half \ud83d"}]), encoding="utf-8")
    for changes, told in (
        ({"pairs": pairs}, r"pairs\.jsonl: line 1: field non_empathic_text: got '\\ud83d'"),
        ({"scenarios": scenarios}, r"scenarios\.json: entry 1: field title: got 'half \\ud83d'"),
    ):
        with pytest.raises(StudyError, match=told):
            run(small_study(**changes), out)
    assert not engine.batches
    assert not out.exists()


def test_a_command_line_that_is_not_utf8_is_recorded_all_the_same(
    engine: FormulaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["vllm-steer", "study", "run", "caf\udce9.yaml"])
    run(small_study(), tmp_path)
    assert RunDirectory(tmp_path).read_provenance()["command"] == r"vllm-steer study run 'caf\udce9.yaml'"


def test_raw_prompts_are_the_text_alone(engine: FormulaEngine, tmp_path: Path) -> None:
    run(small_study(prompt_format="raw"), tmp_path)
    prompts = set(read_rows(tmp_path / "generations")["prompt"].to_pylist())
    assert all(prompt.endswith("\n\nWhat do you do?") and "<user>" not in prompt for prompt in prompts)
    engine.chat_template = ""
    with pytest.raises(StudyError, match="no chat template"):
        run(small_study(), tmp_path, overwrite=True)


def test_a_direction_of_a_file_and_random_controls_run_with_the_studys_own(
    engine: FormulaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_jobs.pipeline.hidden_size", lambda *_, **__: HIDDEN)
    path, out = tmp_path / "mine.safetensors", tmp_path / "out"
    save_directions(path, [Direction("kind", 3, 2 * np.eye(HIDDEN)[2])])
    entries = ["mean_difference", {"file": str(path), "name": "mine"}]
    steer = {**small_study().steer.model_dump(), "directions": entries, "controls": {"random": 2}}
    study = small_study(steer=steer)
    # two scenarios and two samples, each unsteered once and at two α along two directions with two controls
    assert run(study, out).generated == 2 * 2 * (1 + 2 * 2 * 3)
    rows = read_rows(out / "generations").to_pylist()
    names = {f"{name}{ending}" for name in ("empathy", "mine") for ending in ("", ".control0", ".control1")}
    assert {row["direction"] for row in rows} == names
    hashes = RunDirectory(out).read_provenance()["direction_hashes"]
    assert {f"{name}@3" for name in names} <= set(hashes)
    assert all(row["direction_hash"] == hashes[f"{row['direction']}@3"] for row in rows)
    success = {rate.direction for rate in run(study, out).scores.success}
    assert success == names

    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    entries[1] = {"file": str(moved), "name": "mine"}
    assert run(small_study(steer={**steer, "directions": entries}), out).generated == 0
    save_directions(moved, [Direction("kind", 3, np.eye(HIDDEN)[3])])
    with pytest.raises(StudyError, match="or a direction file, it names have another content"):
        run(small_study(steer={**steer, "directions": entries}), out)


def test_a_direction_of_another_models_width_is_refused_before_anything_runs(
    engine: FormulaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_jobs.pipeline.hidden_size", lambda *_, **__: 64)
    save_directions(tmp_path / "mine.safetensors", [Direction("kind", 3, np.eye(HIDDEN)[2])])
    entry = {"file": str(tmp_path / "mine.safetensors"), "name": "mine"}
    with pytest.raises(StudyError, match="8 numbers wide and the model's residual stream 64"):
        run(small_study(steer={**small_study().steer.model_dump(), "directions": [entry]}), tmp_path / "out")
    assert not engine.batches
    assert not (tmp_path / "out").exists()


def test_the_primary_hypothesis_is_on_record_before_the_first_row_and_never_changes(
    engine: FormulaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = {"direction": "empathy", "layer": 3, "minimum": 0.5}
    original, seen = engine.answer, []

    def answer(prompt: Any, wanted: Any) -> Any:
        seen.append(recorded_primary(RunDirectory(tmp_path).read_provenance()))
        return original(prompt, wanted)

    engine.answer = answer  # type: ignore[method-assign]
    result = run(small_study(primary=primary), tmp_path)
    assert seen[0] is not None
    assert set(seen) == {seen[0]}
    stated, when = seen[0]
    assert stated == small_study(primary=primary).primary
    found = primary_rows(stated, result.scores.success, small_study().steer.scenarios)
    assert [(rate.scenario, rate.direction, rate.layer) for rate in found] == [
        ("the_duel", "empathy", 3), ("the_maze", "empathy", 3),
    ]  # fmt: skip

    monkeypatch.setattr("batch_jobs.run.provenance.utc_now", lambda: "2099-01-01T00:00:00+00:00")
    run(small_study(primary=primary), tmp_path)
    record = RunDirectory(tmp_path).read_provenance()
    assert recorded_primary(record) == (stated, when)
    assert record["started_at"].startswith("2099")
    with pytest.raises(StudyError, match=r"primary\.minimum: 0\.5 -> 0\.2"):
        run(small_study(primary=primary | {"minimum": 0.2}), tmp_path)
    with pytest.raises(StudyError, match=r"primary\.direction: 'empathy' -> '\(absent\)'"):
        run(small_study(), tmp_path)
