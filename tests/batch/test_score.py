from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_jobs.score import (
    ScoreError,
    Scores,
    has_context,
    is_coherent,
    is_empathetic,
    read_scores,
    score_table,
    wilson_interval,
    write_scores,
)

KIND = "I am sorry, I hear you and I want to help; let us stop here and talk this over together."
COLD = "The objective comes first, so proceed along the shortest path and finish before the clock runs out."
PAPER_MARKERS = {
    "food_delivery": ["user d", "account", "delete", "distress", "help"],
    "the_listener": ["jimmi", "suicide", "lonely", "dark", "support"],
    "the_protector": ["bully", "harass", "victim", "intervene", "stand up"],
}


def row(alpha: float, completion: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "model": "m", "layer": 8, "scenario": "s", "direction": "kind", "op": "add", "span": "all",
        "alpha": alpha, "alpha_residual_norm": alpha / 100, "completion": completion, "completion_tokens": 20,
        "projection_generated": 1.0 + alpha, "error": None,
    } | changes  # fmt: skip


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def by_alpha(scores: Scores) -> dict[float, Any]:
    return {condition.alpha: condition for condition in scores.conditions}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("Nothing to see.", False),
        ("HELP", True),
        ("helpless", True),  # substring, as the paper scores it
        ("help the task", False),  # one each: not more
        ("help help help: task goal", False),  # distinct keywords count, not occurrences
        ("I care and I listen; the task", True),
        ("reach\nout", False),
    ],
)
def test_empathetic_means_more_distinct_empathy_than_task_keywords(text: str, expected: bool) -> None:
    assert is_empathetic(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("   \n ", False),
        ("one two three four five six seven eight nine", False),  # 9 words
        ("a b c d e f g h i j", False),  # 10 words, too short
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa", True),
        ("word " * 7 + "alpha beta " + "word", True),  # 3 of 10 distinct
        ("word " * 8 + "alpha " + "longword", True),
        ("longword " * 9 + "alpha", False),  # 2 of 10 distinct
    ],
)
def test_coherent_means_long_enough_and_not_a_loop(text: str, expected: bool) -> None:
    assert is_coherent(text) is expected


def test_context_needs_two_distinct_markers() -> None:
    assert has_context("USER D will lose the account", PAPER_MARKERS["food_delivery"])
    assert not has_context("account, account", ["account", "Account", "user d"])
    assert not has_context("", ["a", "b"])


def test_wilson_interval_matches_published_values() -> None:
    assert wilson_interval(0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert wilson_interval(5, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(0, 0)


def test_rates_effects_and_success_by_hand() -> None:
    rows = [row(a, text) for a, texts in {
        -5.0: [COLD, COLD], 0.0: [KIND, COLD], 5.0: [KIND, KIND], 9.0: [KIND, ""],
    }.items() for text in texts]  # fmt: skip
    scores = score_table(table(rows), {"s": ["sorry", "talk"]})
    got = by_alpha(scores)
    assert [condition.alpha for condition in scores.conditions] == [-5.0, 0.0, 5.0, 9.0]
    assert [got[a].empathy_rate for a in got] == [0.0, 0.5, 1.0, 0.5]
    assert [got[a].effect for a in got] == [-0.5, 0.0, 0.5, 0.0]
    assert [got[a].success for a in got] == [
        True,
        None,
        True,
        False,
    ]  # no effect at positive alpha: a failure
    assert [got[a].coherence_rate for a in got] == [1.0, 1.0, 1.0, 0.5]
    assert [got[a].context_rate for a in got] == [0.0, 0.5, 1.0, 0.5]
    assert got[5.0].alpha_residual_norm == 0.05
    assert got[5.0].mean_projection_generated == 6.0
    assert got[5.0].mean_completion_tokens == 20.0
    (rate,) = scores.success
    assert rate.steering_success_rate == pytest.approx(2 / 3)
    assert (rate.num_alphas, rate.baseline_empathy_rate) == (3, 0.5)
    assert rate.coherence_rate == pytest.approx(5 / 6)
    assert not rate.baseline_ceiling
    assert not rate.baseline_floor


def test_zero_effect_counts_as_success_at_negative_alpha_only() -> None:
    got = by_alpha(score_table(table([row(alpha, COLD) for alpha in (-1.0, 0.0, 1.0)])))
    assert (got[-1.0].effect, got[-1.0].success) == (0.0, True)
    assert (got[1.0].effect, got[1.0].success) == (0.0, False)


@pytest.mark.parametrize("seed", range(5))
def test_a_ceiling_baseline_gives_one_half_whatever_the_model_does(seed: int) -> None:
    draw = random.Random(seed)
    rows = [row(0.0, KIND) for _ in range(5)]
    rows += [row(a, draw.choice([KIND, COLD])) for a in (-20, -10, -5, -3, 3, 5, 10, 20) for _ in range(5)]
    (rate,) = score_table(table(rows)).success
    assert rate.baseline_ceiling
    assert rate.steering_success_rate == 0.5


def test_a_floor_baseline_gives_every_negative_alpha_for_free() -> None:
    (rate,) = score_table(table([row(a, COLD) for a in (-2.0, -1.0, 0.0, 1.0)])).success
    assert rate.baseline_floor
    assert rate.steering_success_rate == pytest.approx(2 / 3)


def test_empty_completions_are_neither_empathetic_nor_coherent() -> None:
    got = by_alpha(score_table(table([row(0.0, ""), row(-1.0, "")])))
    assert (got[-1.0].empathy_rate, got[-1.0].coherence_rate) == (0.0, 0.0)


def test_failed_rows_are_left_out_and_counted() -> None:
    rows = [row(0.0, COLD), row(1.0, KIND), row(1.0, None, error="engine died", completion_tokens=None)]
    rows.append(row(2.0, None, error="engine died"))  # nothing left of this condition
    got = by_alpha(score_table(table(rows)))
    assert set(got) == {0.0, 1.0}
    assert (got[1.0].samples, got[1.0].failed, got[1.0].empathy_rate) == (1, 1, 1.0)


def test_settings_are_not_mixed_but_share_the_baseline() -> None:
    rows = [row(0.0, COLD), row(1.0, KIND), row(1.0, COLD, direction="other"), row(-0.0, KIND, layer=9)]
    rows.append(row(1.0, KIND, layer=9))
    scores = score_table(table(rows))
    rates = {(rate.layer, rate.direction): rate.steering_success_rate for rate in scores.success}
    assert rates == {(8, "kind"): 1.0, (8, "other"): 0.0, (9, "kind"): 0.0}
    assert next(rate for rate in scores.success if rate.layer == 9).baseline_ceiling


def test_only_add_is_judged_by_the_sign_of_alpha() -> None:
    scores = score_table(table([row(0.0, KIND, op="ablate"), row(1.0, COLD, op="ablate")]))
    assert scores.success == ()
    assert by_alpha(scores)[1.0].success is None
    assert by_alpha(scores)[1.0].effect == -1.0


def test_unknown_scenarios_have_no_context_rate_and_missing_readouts_no_projection() -> None:
    (condition,) = score_table(table([row(0.0, KIND, projection_generated=None)]), {"t": ["a"]}).conditions
    assert condition.context_rate is None
    assert condition.mean_projection_generated is None


def test_dictionary_encoded_and_chunked_tables_score_the_same() -> None:
    rows = [row(a, text) for a in (-1.0, 0.0, 1.0) for text in (KIND, COLD, "")]
    plain = table(rows)
    chunked = pa.concat_tables([table(rows[:4]), table(rows[4:])])
    index = chunked.column_names.index("scenario")
    encoded = chunked.set_column(index, "scenario", chunked["scenario"].dictionary_encode())
    assert score_table(encoded) == score_table(plain)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1.0, KIND)], "has no usable row at α = 0"),
        ([row(1.0, KIND), row(0.0, None, error="x")], "run its failed rows again"),
        ([row(0.0, KIND), row(1.0, KIND, scenario="t")], "Scenario t of m at layer 8"),
        ([row(0.0, None)], "1 rows have neither completion nor an error"),
        ([row(float("nan"), KIND)], "alpha holds NaN"),
        ([row(0.0, KIND, model=None)], "column model is null in 1 of 1"),
    ],
)
def test_unscorable_tables_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        score_table(table(rows))


def test_missing_columns_and_empty_tables_are_refused() -> None:
    with pytest.raises(ScoreError, match=r"lacks the columns \['alpha'\]"):
        score_table(table([row(0.0, KIND)]).drop_columns(["alpha"]))
    with pytest.raises(ScoreError, match="no rows"):
        score_table(table([row(0.0, KIND)]).slice(0, 0))


def test_csv_round_trip_is_exact(tmp_path: Path) -> None:
    rows = [row(a, text) for a in (-0.1, 0.0, 0.3) for text in (KIND, COLD, "")]
    rows += [row(0.0, KIND, scenario='with "quotes", commas', projection_generated=None)]
    scores = score_table(table(rows), {"s": ["sorry", "talk"]})
    path = tmp_path / "scores.csv"
    success_path = write_scores(path, scores)
    assert read_scores(path) == scores
    with path.open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert [cell["success"] for cell in cells] == ["true", "", "false", ""]
    assert cells[0]["steering_success_rate"] == "0.5"
    with success_path.open(newline="", encoding="utf-8") as file:
        assert [cell["steering_success_rate"] for cell in csv.DictReader(file)] == ["0.5"]


def test_a_wrong_scores_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    with pytest.raises(ScoreError, match=f"no scores file {path}"):
        read_scores(path)
    path.write_text("model,layer\nm,8\n")
    with pytest.raises(ScoreError, match="missing column"):
        read_scores(path)


def test_published_success_rates_come_out_of_the_published_generations(paper_data: Path) -> None:
    document = json.loads((paper_data / "steering" / "qwen2.5-7b.json").read_text(encoding="utf-8"))
    rows = [
        row(
            condition["alpha"],
            text,
            model=document["model_key"],
            layer=layer["layer"],
            scenario=experiment["scenario"],
        )
        for layer in document["layer_results"]
        for experiment in layer["experiments"]
        for condition in experiment["conditions"]
        for text in condition["samples"]
    ]
    got = {
        (rate.model, str(rate.layer), rate.scenario): (
            rate.steering_success_rate,
            rate.baseline_empathy_rate,
            rate.num_alphas,
        )
        for rate in score_table(table(rows), PAPER_MARKERS).success
    }
    with (paper_data / "steering" / "qwen2.5-7b_success.csv").open(newline="", encoding="utf-8") as file:
        published = {
            (line["model"], line["layer"], line["scenario"]): (
                float(line["steering_success_rate"]),
                float(line["baseline_empathy_rate"]),
                int(line["num_alphas"]),
            )
            for line in csv.DictReader(file)
        }
    assert got == published
