"""Two run directories side by side. The study's own writers make the runs; the numbers are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from batch_jobs.compare.runs import Comparison, compare_runs, write_comparison
from batch_jobs.compare.tables import print_comparison
from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.methods import make_directions
from batch_jobs.directions.readout_file import ReadoutKey, StudyReadouts, TextSet, write_readouts
from batch_jobs.directions.validate_directions import validate_study
from batch_jobs.directions.validation_file import write_validation
from batch_jobs.rows import grid
from batch_jobs.rows.store import Generation, read_rows, write_rows
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.compute_scores import score_table
from batch_jobs.scoring.scores_csv import write_scores
from batch_jobs.texts.contrastive import Split
from tests.support.made_pairs import made_split, read_texts
from vllm_steer import save_directions

TEXTS: dict[TextSet, int] = {"train_positive": 8, "train_negative": 8, "test_positive": 5, "test_negative": 5}
PAIRS, OTHERS = made_split(8, 5), made_split(8, 5, seed=1)
KIND, COLD = "I am sorry and want to help and listen. ", "I win the task. "

Completion = Callable[[grid.Row], str | None]


def kinder_with_alpha(row: grid.Row) -> str:
    return f"{(KIND if row.condition.alpha > 0 else COLD) * 8}{row.sample}"


def study(**changes: Any) -> Study:
    fields: dict[str, Any] = {
        "name": "small",
        "model": "owner/tiny",
        "extract": {"layers": [1, 2]},
        "steer": {"layers": [1], "alphas": [-2, 0, 2], "scenarios": ["the_maze"], "samples": 4},
        "sampling": {"temperature": 0.0},
        "validation": {"bootstrap": 100, "random_directions": 2, "lexical_ablation": False},
    }
    return Study.model_validate(fields | changes)


def readouts(hidden_size: int, *, seed: int, split: Split = PAIRS) -> StudyReadouts:
    rng = np.random.default_rng(seed)
    return StudyReadouts(
        texts=read_texts(split),
        arrays={
            ReadoutKey(text_set, skip_first, block): (
                rng.standard_normal((count, hidden_size)) + (0.0 if "negative" in text_set else 3.0)
            ).astype(np.float32)
            for text_set, count in TEXTS.items()
            for skip_first in (0, 1)
            for block in (1, 2)
        },
    )


def write_run(
    path: Path,
    config: Study | None = None,
    *,
    completion: Completion = kinder_with_alpha,
    texts_read: StudyReadouts | None = None,
    split: Split = PAIRS,
    keep: Callable[[grid.Row], bool] = lambda _: True,
    seed_offset: int = 0,
) -> Path:
    """A finished run. `completion` returns None for a row that failed."""
    config, texts_read = config or study(), texts_read or readouts(6, seed=0)
    run, validation = RunDirectory(path), validate_study(config, texts_read, split)
    write_readouts(run.readouts, texts_read)
    save_directions(run.directions, list(make_directions(config, texts_read).values()))
    write_validation(run.validation, validation)
    rows = list(grid.rows(config, grid.conditions(config, validation.mean_residual_norms)))
    write_rows(
        run.generations,
        [generation(row, completion(row), seed_offset) for row in rows if keep(row)],
        {},
    )
    write_scores(run.scores, score_table(read_rows(run.generations)))
    run.write_provenance(
        {
            "study": config.name,
            "config": config.model_dump(mode="json"),
            "config_hash": config.config_hash,
            "versions": {"numpy": "2.0"},
            "git_commit": "abc",
        }
    )
    return path


def generation(row: grid.Row, text: str | None, seed_offset: int) -> Generation:
    cell = row.condition
    return Generation(
        row_id=row.row_id,
        model=cell.model,
        model_revision=None,
        direction=cell.direction,
        direction_hash="d",
        layer=cell.layer,
        op=cell.op,
        span=cell.span,
        alpha=cell.alpha,
        alpha_residual_norm=cell.alpha_residual_norm,
        scenario=cell.scenario_id,
        sample=row.sample,
        seed=row.seed + seed_offset,
        prompt="What do you do?",
        completion=text,
        finish_reason="length",
        prompt_tokens=5,
        completion_tokens=None if text is None else 20,
        projection_prompt=0.0,
        projection_generated=None,
        projection_unsteered=None,
        log_likelihood=None,
        attempts=1,
        started_at=datetime(2025, 1, 1, tzinfo=UTC),
        seconds=1.0,
        error="engine: gone" if text is None else None,
    )


def test_two_runs_of_one_study_agree_in_everything(tmp_path: Path) -> None:
    got = compare_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert (got.config_changes, got.version_changes) == ((), ())
    assert len(got.directions) == 2 * 3  # layers × methods
    assert all(pair.same and pair.cosine == pytest.approx(1.0) for pair in got.directions)
    agreement = got.completions
    assert (agreement.rows_a, agreement.rows_b, agreement.shared, agreement.failed) == (12, 12, 12, 0)
    assert agreement.decoding == "greedy"
    assert agreement.overall is not None
    assert (agreement.overall.equal, agreement.overall.share, agreement.overall.mean_common_share) == (12, 1.0, 1.0)
    assert {alpha: share.rows for alpha, share in agreement.by_alpha.items()} == {-2.0: 4, 0.0: 4, 2.0: 4}
    assert all(pair.a == pair.b for pair in got.success)
    assert [pair.layer for pair in got.validation] == [1, 2]
    assert got.cross_model == ()
    assert "owner/tiny" in (got.no_cross_model or "")


def test_where_completions_part_is_told_by_alpha(tmp_path: Path) -> None:
    def strays(row: grid.Row) -> str | None:
        text = kinder_with_alpha(row)
        return text[:10] + "?" * 10 if row.condition.alpha == 2 and row.sample < 2 else text

    short = "I am sorry and want to help and listen. " * 8 + "0"  # 321 characters
    got = compare_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b", completion=strays)).completions
    assert got.overall is not None
    assert (got.overall.rows, got.overall.equal) == (12, 10)
    assert got.by_alpha[-2.0].share == got.by_alpha[0.0].share == 1.0
    steered = got.by_alpha[2.0]
    assert (steered.rows, steered.equal) == (4, 2)
    assert steered.mean_common_prefix == pytest.approx((10 + 10 + len(short) + len(short)) / 4)
    assert steered.mean_common_share == pytest.approx((10 / len(short) * 2 + 2) / 4)


def test_sampled_rows_are_compared_where_their_seeds_are_equal(tmp_path: Path) -> None:
    sampled = study(sampling={"temperature": 0.7})
    same = compare_runs(write_run(tmp_path / "a", sampled), write_run(tmp_path / "b", sampled)).completions
    assert (same.decoding, same.shared, same.other_seed) == ("sampled", 12, 0)
    other = compare_runs(tmp_path / "a", write_run(tmp_path / "c", sampled, seed_offset=1)).completions
    assert (other.shared, other.other_seed, other.overall, other.by_alpha) == (12, 12, None, {})


def test_runs_at_two_temperatures_are_not_called_greedy(tmp_path: Path) -> None:
    warm = write_run(tmp_path / "b", study(sampling={"temperature": 0.7}))
    got = compare_runs(write_run(tmp_path / "a"), warm)
    assert got.completions.decoding == "sampled"
    assert [(change.field, change.before, change.after) for change in got.config_changes] == [
        ("sampling.temperature", 0.0, 0.7)
    ]


def test_failed_rows_are_counted_and_rows_of_one_side_left_out(tmp_path: Path) -> None:
    def fails(row: grid.Row) -> str | None:
        return None if row.sample == 0 else kinder_with_alpha(row)

    partial = write_run(tmp_path / "b", completion=fails, keep=lambda row: row.sample < 3)
    got = compare_runs(write_run(tmp_path / "a"), partial).completions
    assert (got.rows_a, got.rows_b, got.shared, got.failed) == (12, 9, 9, 3)
    assert got.overall is not None
    assert got.overall.rows == 6


def test_two_empty_completions_are_equal(tmp_path: Path) -> None:
    got = compare_runs(
        write_run(tmp_path / "a", completion=lambda _: ""), write_run(tmp_path / "b", completion=lambda _: "")
    ).completions
    assert got.overall is not None
    assert (got.overall.share, got.overall.mean_common_prefix, got.overall.mean_common_share) == (1.0, 0.0, 1.0)


def test_alphas_in_residual_norms_are_grouped_as_the_config_states_them(tmp_path: Path) -> None:
    grid_in_norms = {
        "layers": [1, 2],
        "alphas": [0, 0.5],
        "alpha_unit": "residual_norm",
        "scenarios": ["the_maze"],
        "samples": 2,
    }
    config = study(steer=grid_in_norms)
    got = compare_runs(write_run(tmp_path / "a", config), write_run(tmp_path / "b", config)).completions
    # the two layers' raw α differ, since their norms do
    assert {alpha: share.rows for alpha, share in got.by_alpha.items()} == {0.0: 4, 0.5: 4}


def test_two_models_have_no_row_in_common_and_are_compared_by_what_they_read(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", texts_read=readouts(6, seed=1))
    b = write_run(tmp_path / "b", study(model="owner/other"), texts_read=readouts(9, seed=2))
    got = compare_runs(a, b)
    assert got.completions.shared == 0
    assert got.completions.overall is None
    assert got.directions == ()  # of two models' axes
    assert all(pair.a is not None and pair.b is not None for pair in got.success)
    assert got.no_cross_model is None
    pairs = [(row.block_a, row.block_b) for row in got.cross_model]
    assert pairs[0] == (got.best_layer_a, got.best_layer_b)
    assert sorted(pairs) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert "no row in common" in printed(got)


def test_the_cross_model_table_prints_the_similarity_with_its_in_class_chance(tmp_path: Path) -> None:
    # B reads what A reads, turned: the models agree on single texts
    own = readouts(6, seed=1)
    turned = StudyReadouts(own.texts, {key: array[:, ::-1] + 2 for key, array in own.arrays.items()})
    a = write_run(tmp_path / "a", texts_read=own)
    got = compare_runs(a, write_run(tmp_path / "b", study(model="owner/other"), texts_read=turned))
    row = next(row for row in got.cross_model if row.block_a == row.block_b == got.best_layer_a)
    assert row.similarity_test > 0.99
    chance = row.shuffled_within_class.similarity_test
    assert chance.p == pytest.approx(1 / 101)
    table = printed(got)[printed(got).index("Cross-model agreement") :]
    line = next(line for line in table.splitlines() if f"{row.block_a}, {row.block_b} " in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[5:8] == [f"{row.similarity_test:.2f}", f"{chance.mean:.2f}", "0.010"]
    # the other model shares the classes alone
    other = compare_runs(a, write_run(tmp_path / "c", study(model="owner/other"), texts_read=readouts(9, seed=2)))
    assert other.cross_model[0].shuffled_within_class.similarity_test.p > 0.05


def test_the_blocks_compared_are_those_the_directions_were_read_at(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", texts_read=readouts(6, seed=1))
    paired_as_in_the_paper = study(
        model="owner/other",
        extract={"layers": [2], "extract_offset": -1},
        steer=study().steer.model_dump() | {"layers": [2]},
    )
    b = write_run(tmp_path / "b", paired_as_in_the_paper, texts_read=readouts(6, seed=2))
    assert {row.block_b for row in compare_runs(a, b).cross_model} == {1}


def test_models_that_read_other_texts_are_not_aligned(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", texts_read=readouts(6, seed=1))
    b = write_run(
        tmp_path / "b", study(model="owner/other"), texts_read=readouts(6, seed=1, split=OTHERS), split=OTHERS
    )
    got = compare_runs(a, b)
    assert got.cross_model == ()
    assert "did not read the same" in (got.no_cross_model or "")


def test_layers_of_one_run_alone_stand_beside_a_gap(tmp_path: Path) -> None:
    narrow = study(extract={"layers": [1]})
    got = compare_runs(write_run(tmp_path / "a"), write_run(tmp_path / "b", narrow))
    assert [(pair.layer, pair.b is None) for pair in got.validation] == [(1, False), (2, True)]
    assert "–" in printed(got)


def test_the_file_holds_the_comparison_as_json(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", texts_read=readouts(6, seed=1))
    b = write_run(tmp_path / "b", study(model="owner/other"), texts_read=readouts(9, seed=2))
    got = compare_runs(a, b)
    write_comparison(tmp_path / "out" / "comparison.json", got)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert document["a"]["model"] == "owner/tiny"
    assert document["completions"]["shared"] == 0
    assert document["cross_model"][0]["transfer_auroc"] == got.cross_model[0].transfer_auroc
    assert {change["field"] for change in document["config_changes"]} == {"model"}


def test_the_printed_comparison_names_what_differs_and_every_table(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", study(seed=5), texts_read=readouts(6, seed=3))
    text = printed(compare_runs(a, b))
    for said in ("seed", "Direction empathy at layer 1 differs: cosine", "greedy", "100.0%", "the_maze", "best"):
        assert said in text


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with pytest.raises(StudyError, match="not a run directory") as caught:
        compare_runs(run, tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)


def printed(comparison: Comparison) -> str:
    text = StringIO()
    print_comparison(comparison, Console(file=text, width=160))
    return text.getvalue()
