"""A study on a model that thinks before it answers, from its config to its report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from batch_jobs.compare.completions import compare_completions
from batch_jobs.config.study import Study
from batch_jobs.pipeline import RunOptions, StudyResult, run_study
from batch_jobs.report.samples import read_generations
from batch_jobs.rows import store
from batch_jobs.rows.store import read_index, read_rows
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.behaviour import behaviour_points
from batch_jobs.scoring.compute_scores import score_table
from batch_jobs.scoring.scores_csv import ScoreError, read_scores
from tests.batch.scoring.test_compute_scores import row as scored
from tests.support.formula_engine import COLD, COMPLETION_TOKENS, KIND, FormulaEngine, install

THOUGHT = "Someone cries. I could help, support and comfort them."


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    for module in ("engine.start_engine", "pipeline", "generate.local_executor"):
        monkeypatch.setattr(f"batch_jobs.{module}.decoder_blocks", lambda *_, **__: 6)
    monkeypatch.setattr("batch_jobs.pipeline.write_report", lambda path: path)
    return install(monkeypatch)


def make_study(**changes: Any) -> Study:
    document = {
        "name": "small",
        "model": "owner/model",
        "extract": {"layers": [3]},
        "steer": {"layers": [3], "alphas": [-1, 0, 1], "scenarios": ["the_duel"], "samples": 4},
        "skip_first": 1,
    }
    return Study.model_validate({**document, **changes})


def run(study: Study, folder: Path, log: io.StringIO | None = None, **options: Any) -> StudyResult:
    console = Console(file=log or io.StringIO(), width=1000)
    return run_study(study, RunDirectory(folder), RunOptions(**options), console=console)


def think(engine: FormulaEngine, wrap: Callable[[str, int], str]) -> None:
    """Replace every generated text by `wrap(answer, place in its batch)`."""
    original = engine.generate

    def generate(prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        outputs = original(prompts, params, use_tqdm=use_tqdm)
        for place, output in enumerate(outputs):
            output.outputs[0].text = wrap(output.outputs[0].text, place)
        return outputs

    engine.generate = generate  # type: ignore[method-assign]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_rows(folder / "generations").to_pylist()
    return rows


@pytest.mark.parametrize(
    ("opening", "wrap"),
    [
        ("", lambda answer, _: f"<think>\n{THOUGHT}\n</think>\n\n{answer}"),
        ("<think>\n", lambda answer, _: f"{THOUGHT}\n</think>\n\n{answer}"),
    ],
)
def test_thought_and_answer_are_stored_apart_and_the_answer_alone_is_scored(
    engine: FormulaEngine, tmp_path: Path, opening: str, wrap: Callable[[str, int], str]
) -> None:
    engine.opening = opening
    think(engine, wrap)
    result = run(make_study(), tmp_path)
    rows = rows_of(tmp_path)
    assert {row["thought"] for row in rows} == {THOUGHT}
    assert {(row["alpha"] > 0, row["completion"]) for row in rows} == {
        (True, (KIND * 8).strip()),
        (False, (COLD * 8).strip()),
    }
    # the whole generation is counted and read, as the engine saw it
    assert {row["completion_tokens"] for row in rows} == {COMPLETION_TOKENS}
    assert {row["projection_generated"] for row in rows} != {None}
    # the thought is full of empathy words
    assert {row.alpha: row.empathy_rate for row in result.scores.conditions} == {-1: 0.0, 0: 0.0, 1: 1.0}
    assert result.unfinished_thoughts == 0


def test_a_model_that_does_not_think_has_no_thoughts_and_unchanged_completions(
    engine: FormulaEngine, tmp_path: Path
) -> None:
    run(make_study(), tmp_path)
    assert {(row["thought"], row["completion"]) for row in rows_of(tmp_path)} == {(None, KIND * 8), (None, COLD * 8)}


def cut_every_fourth(answer: str, place: int) -> str:
    return f"<think>{THOUGHT}" if place % 4 == 0 else f"<think>{THOUGHT}</think>{answer}"


def test_a_thought_that_never_closed_is_no_answer_and_is_counted(engine: FormulaEngine, tmp_path: Path) -> None:
    think(engine, cut_every_fourth)
    result = run(make_study(), tmp_path)
    cut = [row for row in rows_of(tmp_path) if row["completion"] is None]
    assert [(row["thought"], row["error"], row["finish_reason"]) for row in cut] == [(THOUGHT, None, "length")] * 3
    assert [(row.samples, row.failed, row.unfinished_thoughts) for row in result.scores.conditions] == [(3, 0, 1)] * 3
    assert (result.failed, result.unfinished_thoughts) == (0, 3)
    record = json.loads((tmp_path / "provenance.json").read_text(encoding="utf-8"))
    assert record["rows_unfinished_thoughts"] == 3
    # a cut thought is a result: neither the next call nor --retry-failed generates it again
    assert len(read_index(tmp_path / "generations").done) == 12
    assert run(make_study(), tmp_path, retry_failed=True).generated == 0
    # and no other reader takes it as an answer
    assert len(behaviour_points(tmp_path / "generations").grade) == 9
    shown = read_generations(tmp_path / "generations", per_condition=4, max_samples=100)
    assert (shown.num_rows, shown.num_shown, shown.num_failed, shown.unfinished_thoughts) == (12, 9, 0, 3)
    assert {sample.thought for group in shown.groups for sample in group.samples} == {THOUGHT}


def test_without_a_finished_baseline_the_error_says_what_to_do(engine: FormulaEngine, tmp_path: Path) -> None:
    think(engine, lambda *_: f"<think>{THOUGHT}")
    with pytest.raises(ScoreError, match=r"no usable row at α = 0.*4 of them ended inside a thought.*max_tokens"):
        run(make_study(), tmp_path)
    assert len(rows_of(tmp_path)) == 12


def test_rows_that_ended_inside_a_thought_are_left_out_and_counted_apart() -> None:
    unfinished: dict[str, Any] = {"thought": "I could help and support them, but", "projection_generated": 1e9}
    rows = [scored(0.0, COLD * 2, thought=None), scored(1.0, KIND * 2, thought="Win."), scored(1.0, None, **unfinished)]
    rows += [scored(1.0, None, thought=None, error="engine died"), scored(2.0, None, **unfinished)]
    got = {row.alpha: row for row in score_table(pa.Table.from_pylist(rows)).conditions}
    assert set(got) == {0.0, 1.0}  # the last condition has no rows left
    one = got[1.0]
    assert (one.samples, one.failed, one.unfinished_thoughts, one.empathy_rate) == (1, 1, 1, 1.0)
    assert one.mean_projection_generated == 2.0
    assert (got[0.0].failed, got[0.0].unfinished_thoughts) == (0, 0)


def test_scores_of_an_earlier_version_are_read(engine: FormulaEngine, tmp_path: Path) -> None:
    think(engine, cut_every_fourth)
    scores = run(make_study(), tmp_path).scores
    path = RunDirectory(tmp_path).scores
    assert read_scores(path) == scores
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("unfinished_thoughts") for row in rows] == ["1", "1", "1"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert [row.unfinished_thoughts for row in read_scores(path).conditions] == [0, 0, 0]


def test_two_runs_agree_on_thoughts_as_on_answers(engine: FormulaEngine, tmp_path: Path) -> None:
    think(engine, cut_every_fourth)
    run(make_study(), tmp_path / "a")
    run(make_study(), tmp_path / "b")
    agreement = compare_completions(
        tmp_path / "a" / "generations", tmp_path / "b" / "generations", greedy=False, alpha_unit="raw"
    )
    assert (agreement.shared, agreement.failed) == (12, 0)
    assert agreement.overall is not None
    assert (agreement.overall.rows, agreement.overall.equal) == (12, 12)


def test_a_template_that_opens_a_thought_is_warned_about_before_any_row(engine: FormulaEngine, tmp_path: Path) -> None:
    engine.opening = "<think>\n"
    original = engine.generate
    logged: list[str] = []

    def generate(prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        logged.append(log.getvalue())
        outputs = original(prompts, params, use_tqdm=use_tqdm)
        for output in outputs:
            output.outputs[0].text = f"{THOUGHT}</think>{output.outputs[0].text}"
        return outputs

    engine.generate = generate  # type: ignore[method-assign]
    log = io.StringIO()
    run(make_study(), tmp_path / "opened", log)
    hint = "The chat template of owner/model opens a thought (<think>)"
    assert log.getvalue().count(hint) == 1
    assert "chat_template_kwargs (often {enable_thinking: false})" in log.getvalue()
    first_rows = next(place for place, batch in enumerate(engine.batches) if batch[0].fields["max_tokens"] > 1)
    assert hint in logged[first_rows]


@pytest.mark.parametrize("opening", ["", "<think>\n\n</think>\n\n"])
def test_a_template_that_closes_its_thought_is_not_warned_about(
    engine: FormulaEngine, tmp_path: Path, opening: str
) -> None:
    engine.opening = opening
    log = io.StringIO()
    run(make_study(), tmp_path, log)
    assert "opens a thought" not in log.getvalue()


def test_variables_of_the_config_go_to_the_chat_template(engine: FormulaEngine, tmp_path: Path) -> None:
    run(make_study(), tmp_path / "without")
    run(make_study(chat_template_kwargs={"enable_thinking": False}), tmp_path / "with")
    assert engine.variables == [{}, {"enable_thinking": False}]


def test_text_that_no_file_can_hold_is_the_rows_error(engine: FormulaEngine, tmp_path: Path) -> None:
    think(engine, lambda answer, place: "half \ud83d" if place == 0 else answer)
    result = run(make_study(), tmp_path)
    assert result.failed == 1
    (failed,) = [row for row in rows_of(tmp_path) if row["error"]]
    assert failed["error"] == "the tokenizer made text without a UTF-8 form (half of a surrogate pair)"


def test_rows_of_an_earlier_version_are_read_and_scored(
    engine: FormulaEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_study(rows_per_part=4), tmp_path)
    table = read_rows(tmp_path / "generations")
    for part in sorted((tmp_path / "generations").rglob("*.parquet"))[:2]:
        old = store.pq.read_table(part, partitioning=None).drop_columns(["thought"])
        store.pq.write_table(old, part)
    assert read_rows(tmp_path / "generations").equals(table)
    again = run(make_study(rows_per_part=4), tmp_path)
    assert (again.generated, again.unfinished_thoughts) == (0, 0)
    assert [row.samples for row in again.scores.conditions] == [4, 4, 4]
    assert read_generations(tmp_path / "generations", per_condition=4, max_samples=100).num_shown == 12


def test_a_row_with_neither_completion_nor_error_nor_thought_is_still_refused(
    engine: FormulaEngine, tmp_path: Path
) -> None:
    run(make_study(), tmp_path)
    table = read_rows(tmp_path / "generations")
    lost = table.set_column(
        table.schema.get_field_index("completion"), "completion", pa.nulls(table.num_rows, pa.string())
    )
    with pytest.raises(ScoreError, match="12 rows have neither completion nor an error"):
        score_table(lost)
