from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

from batch_jobs.scoring.compute_scores import (
    ScoreError,
    Scores,
    read_scores,
    score_generations,
    score_table,
    write_scores,
)

KIND = "I am sorry, I hear you and I want to help; let us stop here and talk this over together."
COLD = "The objective comes first, so proceed along the shortest path and finish before the clock runs out."


def row(alpha: float, completion: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "layer": 8,
        "scenario": "s",
        "direction": "kind",
        "op": "add",
        "span": "all",
        "alpha": alpha,
        "alpha_residual_norm": alpha / 100,
        "completion": completion,
        "completion_tokens": 20,
        "projection_generated": 1.0 + alpha,
        "error": None,
    } | changes


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def by_alpha(scores: Scores) -> dict[float, Any]:
    return {condition.alpha: condition for condition in scores.conditions}


def test_rates_effects_and_success_by_hand() -> None:
    rows = [
        row(a, text)
        for a, texts in {
            -5.0: [COLD, COLD],
            0.0: [KIND, COLD],
            5.0: [KIND, KIND],
            9.0: [KIND, ""],
        }.items()
        for text in texts
    ]
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
    assert not rate.cannot_rise
    assert not rate.cannot_fall


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
    assert rate.cannot_rise
    assert rate.steering_success_rate == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_a_floor_baseline_decides_nothing_and_a_ceiling_everything(seed: int) -> None:
    draw = random.Random(seed)
    alphas = (-20, -10, -5, -3, 3, 5, 10, 20)
    texts = {(a, k): draw.choice([KIND, COLD]) for a in alphas for k in range(2)}
    rises = {a: KIND in (texts[a, 0], texts[a, 1]) for a in alphas}
    falls = {a: COLD in (texts[a, 0], texts[a, 1]) for a in alphas}
    for unsteered, moved in ((COLD, rises), (KIND, falls)):
        rows = [row(0.0, unsteered) for _ in range(5)] + [row(a, text) for (a, _), text in texts.items()]
        (rate,) = score_table(table(rows)).success
        floor = unsteered == COLD
        assert (rate.cannot_fall, rate.cannot_rise, rate.num_decided) == (floor, not floor, 0 if floor else 8)
        # at a floor a negative α succeeds only where nothing rose
        succeed = sum(rises[a] if a > 0 else not rises[a] for a in alphas) if floor else 4
        assert rate.steering_success_rate == succeed / 8
        # of the α that cannot move in their direction, the corrected rate counts those that moved against it: failures
        able = [a for a in alphas if (a > 0) == floor]
        counted = len(able) + sum(moved[a] for a in alphas if a not in able)
        assert rate.num_decidable == counted
        assert rate.corrected_success_rate == sum(moved[a] for a in able) / counted


def test_empty_completions_are_neither_empathetic_nor_coherent() -> None:
    got = by_alpha(score_table(table([row(0.0, ""), row(-1.0, "")])))
    assert (got[-1.0].empathy_rate, got[-1.0].coherence_rate) == (0.0, 0.0)


def test_failed_rows_are_left_out_and_counted() -> None:
    rows = [row(0.0, COLD), row(1.0, KIND), row(1.0, None, error="engine died", completion_tokens=None)]
    rows.append(row(2.0, None, error="engine died"))  # this condition has no rows left
    got = by_alpha(score_table(table(rows)))
    assert set(got) == {0.0, 1.0}
    assert (got[1.0].samples, got[1.0].failed, got[1.0].empathy_rate) == (1, 1, 1.0)


def test_settings_are_not_mixed_but_share_the_baseline() -> None:
    rows = [row(0.0, COLD), row(1.0, KIND), row(1.0, COLD, direction="other"), row(-0.0, KIND, layer=9)]
    rows.append(row(1.0, KIND, layer=9))
    scores = score_table(table(rows))
    rates = {(rate.layer, rate.direction): rate.steering_success_rate for rate in scores.success}
    assert rates == {(8, "kind"): 1.0, (8, "other"): 0.0, (9, "kind"): 0.0}
    assert next(rate for rate in scores.success if rate.layer == 9).cannot_rise


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
    rows += [row(a, KIND, scenario="graded", row_id=f"{a}", log_likelihood=-1 / 3) for a in (0.0, 1.0)]
    scores = score_table(table([{"row_id": "x", "log_likelihood": None} | each for each in rows]), grades={"1.0": 2})
    path = tmp_path / "scores.csv"
    success_path = write_scores(path, scores)
    assert read_scores(path) == scores
    with path.open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert [cell["success"] for cell in cells if cell["scenario"] == "s"] == ["true", "", "false"]
    assert next(cell for cell in cells if cell["scenario"] == "s")["steering_success_rate"] == "0.5"
    with success_path.open(newline="", encoding="utf-8") as file:
        assert [cell["steering_success_rate"] for cell in csv.DictReader(file)] == ["0.0", "0.5"]


def test_a_wrong_scores_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    with pytest.raises(ScoreError, match=f"no scores file {path}"):
        read_scores(path)
    path.write_text("model,layer\nm,8\n")
    with pytest.raises(ScoreError, match="missing column"):
        read_scores(path)


def test_an_effect_is_counted_in_the_direction_that_alpha_asks_for() -> None:
    rows = [row(0.0, KIND), row(0.0, COLD), row(-1.0, KIND), row(-2.0, COLD), row(1.0, KIND), row(2.0, COLD)]
    got = by_alpha(score_table(table(rows)))
    assert {alpha: got[alpha].directional_effect for alpha in got} == {
        -2.0: 0.5,
        -1.0: -0.5,
        0.0: None,
        1.0: 0.5,
        2.0: -0.5,
    }
    # 1 of 1 against 1 of 2: as extreme are that and 1 against 0, so p = max over r of r · (1 - r²), at r = 1 / √3
    assert got[1.0].effect_p == pytest.approx(2 / 27**0.5, rel=1e-6)  # scipy's optimiser stops at 1e-8 or so
    assert got[-1.0].effect_p == 1.0
    assert got[-2.0].effect_p == pytest.approx(2 / 27**0.5, rel=1e-6)
    # Benjamini and Hochberg by hand: two of four p are equal, so each becomes p · 4 / 2
    assert got[1.0].effect_q == pytest.approx(2 * 2 / 27**0.5)
    assert got[0.0].effect_q is None
    assert got[0.0].effect_p is None
    assert {condition.baseline_samples for condition in got.values()} == {2}


def test_no_effect_is_no_corrected_success_at_either_sign() -> None:
    rows = [row(alpha, text) for alpha in (-1.0, 0.0, 1.0) for text in (KIND, COLD)]
    (rate,) = score_table(table(rows)).success
    assert rate.steering_success_rate == 0.5
    assert (rate.corrected_success_rate, rate.num_decidable) == (0.0, 2)
    assert rate.trend == pytest.approx(0.0, abs=1e-12)  # a sum of terms that cancel
    assert (rate.gain, rate.loss, rate.gain_minus_loss, rate.delta, rate.alpha_auc) == (0.0, 0.0, 0.0, 0.0, 0.5)
    assert rate.delta_low is not None
    assert rate.delta_high is not None
    assert rate.delta_low < -0.3  # two samples a cell tell little
    assert rate.delta_high > 0.3


def test_alphas_that_the_baseline_leaves_no_room_are_left_out_of_the_corrected_rate() -> None:
    ceiling = [row(0.0, KIND), row(-1.0, COLD), row(-2.0, KIND), row(1.0, KIND), row(2.0, COLD)]
    (rate,) = score_table(table(ceiling)).success
    # α = 2 fell against its sign, which is evidence; α = 1 could not have risen and did not move
    assert (rate.corrected_success_rate, rate.num_decidable, rate.num_alphas) == (pytest.approx(1 / 3), 3, 4)
    floor = [row(0.0, COLD), row(-1.0, COLD), row(1.0, KIND)]
    (rate,) = score_table(table(floor)).success
    assert (rate.corrected_success_rate, rate.num_decidable, rate.num_alphas) == (1.0, 1, 2)
    (rate,) = score_table(table([row(0.0, KIND), row(1.0, KIND)])).success
    assert (rate.corrected_success_rate, rate.num_decidable, rate.trend, rate.trend_p) == (None, 0, None, None)


def test_the_trend_counts_the_pooled_baseline_and_every_alpha() -> None:
    rows = [row(a, KIND if k < hits else COLD) for a, hits in {-5.0: 0, 0.0: 2, 5.0: 4}.items() for k in range(4)]
    rows += [row(0.0, COLD, direction="other")]
    (rate,) = score_table(table(rows)).success
    alphas = [sample["alpha"] for sample in rows]
    kind = [sample["completion"] == KIND for sample in rows]
    assert rate.trend == pytest.approx(spearmanr(alphas, kind).statistic, rel=1e-9)  # float64 sums
    assert 0 < rate.trend_p < 0.05  # type: ignore[operator]


def test_failure_signatures_become_rates() -> None:
    texts = ["", "move " * 20, "Output: 'open_door'", KIND]
    (condition,) = score_table(table([row(0.0, text) for text in texts])).conditions
    assert (condition.empty_rate, condition.loop_rate, condition.code_like_rate) == (0.25, 0.25, 0.25)
    assert condition.mean_repetition == pytest.approx((1 - 1 / 17) / 4)
    (empty,) = score_table(table([row(0.0, "")])).conditions
    assert empty.mean_compression_ratio is None


def test_columns_that_older_tables_lack_come_out_none_and_nulls_are_left_out_of_means() -> None:
    (old,) = score_table(table([row(0.0, KIND)])).conditions
    assert (old.mean_log_likelihood, old.mean_projection_unsteered, old.mean_grade) == (None, None, None)
    rows = [
        row(0.0, KIND, log_likelihood=-1.0, projection_unsteered=3.0, completion_tokens=None),
        row(0.0, KIND, log_likelihood=None, projection_unsteered=5.0, completion_tokens=None),
    ]
    (new,) = score_table(table(rows)).conditions
    assert (new.mean_log_likelihood, new.mean_projection_unsteered, new.mean_completion_tokens) == (-1.0, 4.0, None)


def test_judge_grades_are_averaged_over_the_rows_that_have_one() -> None:
    rows = [row(0.0, KIND, row_id=name) for name in "abc"] + [row(1.0, KIND, row_id="d")]
    got = by_alpha(score_table(table(rows), grades={"a": 2, "b": 1, "unknown": 0}))
    assert (got[0.0].mean_grade, got[1.0].mean_grade) == (1.5, None)
    with pytest.raises(ScoreError, match=r"grades hold \[3\]"):
        score_table(table(rows), grades={"a": 3})
    with pytest.raises(ScoreError, match="no row_id"):
        score_table(table([row(0.0, KIND)]), grades={"a": 2})


def store(folder: Path, rows: list[dict[str, Any]], name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows), folder / f"part-{name}.parquet")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_of_parts_scores_as_the_table_of_its_rows(tmp_path: Path, processes: int) -> None:
    rows = [
        row(alpha, text, layer=layer, row_id=f"{layer}{alpha}{text[:5]}", log_likelihood=-len(text) / 7)
        for layer in (8, 9)
        for alpha in (-1.0, 0.0, 1.0)
        for text in (KIND, COLD, "", "move " * 9)
    ]
    rows.append(row(1.0, None, row_id="x", error="engine died", completion_tokens=None))
    for index in range(0, len(rows), 5):
        store(tmp_path / f"layer_key={rows[index]['layer']}", rows[index : index + 5], f"{index:02}")
    grades = {rows[0]["row_id"]: 2}
    markers = {"s": ["sorry", "talk"]}
    assert score_generations(tmp_path, markers, grades, processes) == score_table(table(rows), markers, grades)


def test_a_bad_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="no generations under"):
        score_generations(tmp_path)
    store(tmp_path, [row(0.0, KIND)], "good")
    store(tmp_path, [row(0.0, None)], "null")
    with pytest.raises(ScoreError, match=r"part-null.parquet: 1 rows have neither"):
        score_generations(tmp_path)
    (tmp_path / "part-null.parquet").write_bytes(b"no parquet")
    with pytest.raises(ScoreError, match=r"part-null.parquet: not a readable Parquet file"):
        score_generations(tmp_path)
    pq.write_table(table([row(0.0, KIND)]).drop_columns(["span"]), tmp_path / "part-null.parquet")
    with pytest.raises(ScoreError, match=r"part-null.parquet: The table lacks the columns \['span'\]"):
        score_generations(tmp_path)


def test_p_values_are_corrected_for_their_number_and_controls_among_themselves() -> None:
    outcome = {"kind": [(-1.0, 0), (1.0, 5)], "other": [(-1.0, 2), (1.0, 4)], "kind.control0": [(-1.0, 3), (1.0, 3)]}
    rows = [row(0.0, KIND if k < 2 else COLD) for k in range(5)]
    for name, cells in outcome.items():
        rows += [row(a, KIND if k < hits else COLD, direction=name) for a, hits in cells for k in range(5)]
    scores = score_table(table(rows))
    real = [one for one in scores.conditions if one.direction in ("kind", "other") and one.effect_p is not None]
    ordered = sorted(real, key=lambda one: one.effect_p or 0.0)
    p = [one.effect_p or 0.0 for one in ordered]
    assert len(p) == 4
    assert [one.effect_q for one in ordered] == pytest.approx(
        [min(p[j] * 4 / (j + 1) for j in range(i, 4)) for i in range(4)]
    )
    rates = {rate.direction: rate for rate in scores.success}
    assert rates["kind"].trend_p_holm == pytest.approx(2 * (rates["kind"].trend_p or 0.0))
    assert rates["kind.control0"].trend_p_holm == rates["kind.control0"].trend_p


def test_a_sound_sample_is_empathetic_coherent_and_in_context() -> None:
    loop = "sorry help " * 40
    texts = {0.0: [KIND, COLD], 1.0: [KIND, loop], 2.0: ["I am sorry.", KIND + " Jimmi, it is dark."]}
    rows = [row(a, text) for a, pair in texts.items() for text in pair]
    got = by_alpha(score_table(table(rows)))
    assert [got[a].sound_rate for a in got] == [0.5, 0.5, 0.5]
    assert [got[a].empathy_rate for a in got] == [0.5, 1.0, 1.0]
    got = by_alpha(score_table(table(rows), {"s": ["jimmi", "dark"]}))
    assert [got[a].sound_rate for a in got] == [0.0, 0.0, 0.5]
    assert [got[a].short_rate for a in got] == [0.0, 0.0, 0.5]


def test_a_log_likelihood_is_judged_by_its_distance_from_the_unsteered_median() -> None:
    base = [row(0.0, COLD, log_likelihood=value) for value in (-1.0, -2.0, -9.0)]
    rows = [*base, row(-1.0, COLD, log_likelihood=-0.5), row(1.0, COLD, log_likelihood=-4.0)]
    rows.append(row(2.0, COLD, log_likelihood=None))
    got = by_alpha(score_table(table(rows)))
    # the median is -2; a loop of high likelihood and odd text of low likelihood both lie away from it
    assert [got[a].log_likelihood_distance for a in (-1.0, 0.0, 1.0, 2.0)] == [1.5, 2.0, 2.0, None]


def test_verdicts_that_rest_on_matches_inside_words_are_counted() -> None:
    (before, after) = score_table(table([row(0.0, COLD), row(1.0, "I was scared of it")])).conditions
    assert (after.empathy_rate, after.empathy_rate_word_start, after.word_start_changes) == (1.0, 0.0, 1.0)
    assert (before.empathy_rate, before.empathy_rate_word_start, before.word_start_changes) == (0.0, 0.0, 0.0)
    scores = score_table(table([row(0.0, COLD), row(-1.0, COLD), row(1.0, "scared"), row(1.0, KIND)]))
    (rate,) = scores.success
    assert (rate.delta, rate.delta_word_start, rate.word_start_changes) == (1.0, 0.5, pytest.approx(1 / 3))
