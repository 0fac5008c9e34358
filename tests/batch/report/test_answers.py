"""The paragraph at the top of a report, and the cost beside it."""

from __future__ import annotations

import csv
import html
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.cost.cost_curve import CostCurve, CostPoint, write_cost
from batch_jobs.report.answers import answers, primary_outcome
from batch_jobs.report.figures.catalogue import draw_figures
from batch_jobs.report.page import report_page
from batch_jobs.report.results import RunResults, read_run
from batch_jobs.report.table_rows import cost_rows
from tests.batch.report.test_page import words
from tests.support.synthetic_run import IN_NORMS, MEAN_NORM, SCENARIOS, demo_rows, generation, study, write_run


def with_controls(kind_controls: bool = False) -> list[dict[str, Any]]:
    """The synthetic rows, and those of two controls that do nothing, or as much as the direction."""
    controls = []
    for number in (0, 1):
        for scenario in SCENARIOS:
            for in_norms in IN_NORMS:
                if in_norms:
                    for sample in range(5):
                        row = generation(scenario, in_norms if kind_controls else 0.0, sample)
                        row |= {
                            "direction": f"empathy.control{number}",
                            "alpha": in_norms * MEAN_NORM[16],
                            "alpha_residual_norm": in_norms,
                            "row_id": f"c{number}{scenario}{in_norms}{sample}",
                        }
                        controls.append(row)
    return [*demo_rows(), *controls]


def results_of(folder: Path, rows: list[dict[str, Any]]) -> RunResults:
    return read_run(write_run(folder, rows), per_condition=5, max_samples=2000)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    return results_of(tmp_path_factory.mktemp("run"), with_controls())


def test_the_page_begins_with_three_answers(results: RunResults) -> None:
    detects, steers, costs = answers(results)
    beyond = results.validation.beyond_words[results.validation.best_layer]
    assert detects.verdict == beyond.verdict
    assert f"a bag of words reaches {beyond.bag_of_words.auroc:.2f}" in detects.grounds
    (effect,) = [one for one in results.findings.controls if one.scenario is None]  # type: ignore[union-attr]
    assert steers.verdict == "yes"
    assert f"Δ {effect.comparison.delta:.2f} from −α to +α" in steers.grounds
    assert "2 random controls" in steers.grounds
    assert "rank p is 0.33, which 2 controls cannot bring below 0.33; 19 can bring it to 0.05" in steers.grounds
    assert costs.verdict == "not measured"
    text = html.unescape(words(report_page(results, draw_figures(results))))
    places = [text.index(one.question) for one in (detects, steers, costs)]
    assert places == sorted(places)
    assert places[-1] < text.index("Test AUROC")
    assert text.index(steers.grounds) < text.index("Test AUROC")


def test_the_figure_of_controls_shows_every_delta(results: RunResults) -> None:
    drawing = draw_figures(results)["11"].drawing
    assert drawing is not None
    rows = list(csv.DictReader(drawing.numbers.splitlines()))
    controls = [float(row["y"]) for row in rows if row["series"] == "controls"]
    assert len(controls) == 2 * 4  # two controls: all scenarios together, and each
    own = {float(row["x"]): row for row in rows if row["series"] == "the direction"}
    rates = {rate.scenario: rate for rate in results.scores.success if rate.direction == "empathy"}
    for place, scenario in enumerate(SCENARIOS, start=1):
        rate = rates[scenario]
        found = [float(own[float(place)][name]) for name in ("y", "low", "high")]
        # the interval is over all rows of the scenario, the mean over seeds that every direction has
        assert found[1:] == pytest.approx([rate.delta_low, rate.delta_high])
        assert found[0] == pytest.approx(rate.delta, abs=0.1)


def test_controls_that_do_as_much_leave_the_question_undecided_or_deny_it(tmp_path: Path) -> None:
    steers = answers(results_of(tmp_path, with_controls(kind_controls=True)))[1]
    assert steers.verdict in ("no", "undecided")


def test_without_controls_it_is_said_that_nothing_was_compared(tmp_path: Path) -> None:
    steers = answers(results_of(tmp_path, demo_rows()))[1]
    assert steers.verdict == "not measured"
    assert "No control direction went through the grid" in steers.grounds
    assert "The largest Δ of 3" in steers.grounds


@pytest.mark.parametrize(
    ("stated", "verdict"),
    [({}, "held"), ({"sign": "negative"}, "contradicted"), ({"minimum": 0.99}, "undecided")],
)
def test_the_primary_hypothesis_gets_its_verdict(stated: dict[str, Any], verdict: str, results: RunResults) -> None:
    record = {"direction": "empathy", "layer": 16, "stated_at": "2026-01-02T03:04:05+00:00", **stated}
    found = primary_outcome(replace(results, provenance={**results.provenance, "primary": record}))
    assert found is not None
    assert (found.verdict, found.stated_at) == (verdict, record["stated_at"])
    rows = [row for row in results.scores.success if row.direction == "empathy"]
    mean = sum(row.delta or 0 for row in rows) / 3
    assert f"Δ is {mean:.2f}" in found.grounds
    # the interval of a mean of three independent Δ: the squared distances add up
    low = mean - math.sqrt(sum(((row.delta or 0) - (row.delta_low or 0)) ** 2 for row in rows)) / 3
    assert f"({low:.2f} to" in found.grounds
    assert primary_outcome(results) is None


def test_the_cost_stands_beside_what_the_same_strength_does(results: RunResults, tmp_path: Path) -> None:
    alpha = 0.4 * MEAN_NORM[16]
    points = (
        CostPoint(None, None, 0.0, 0.0, 20.0, 0.75, 500, 16),
        CostPoint(16, "empathy", alpha, 0.4, 30.0, 0.5, 500, 16),
        CostPoint(16, "empathy", -alpha, -0.4, 25.0, 0.625, 500, 16),
        CostPoint(16, "empathy.control0", alpha, 0.4, 22.0, 0.75, 500, 16),
    )
    run = write_run(tmp_path, with_controls())
    write_cost(run / "cost.json", CostCurve("0" * 16, points))
    costly = read_run(run, per_condition=5, max_samples=2000)
    plain, *steered = cost_rows(costly)
    assert (plain.name, plain.ratio, plain.delta) == ("unsteered", 1.0, None)
    assert [(row.name, row.ratio) for row in steered] == [
        ("layer 16, empathy", 1.25),
        ("layer 16, empathy", 1.5),
        ("layer 16, empathy.control0", 1.1),
    ]
    rates = {
        row.alpha: row.empathy_rate
        for row in costly.scores.conditions
        if row.direction == "empathy" and row.scenario == "the_protector" and abs(row.alpha) == alpha
    }
    assert set(rates) == {alpha, -alpha}
    mean = [
        sum(row.empathy_rate for row in costly.scores.conditions if row.direction == "empathy" and row.alpha == one) / 3
        for one in (alpha, -alpha)
    ]
    assert steered[1].rate == pytest.approx(mean[0])
    assert steered[0].delta == steered[1].delta == pytest.approx(mean[0] - mean[1])
    grounds = answers(costly)[2].grounds
    assert "1.50 times that of the unsteered model and 0.50 of 16 plain questions" in grounds
    figures = draw_figures(costly)
    assert "Neutral text" in (figures["10"].drawing.description if figures["10"].drawing else "")
    assert "Cost of steering" in words(report_page(costly, figures))
    assert json.loads((run / "provenance.json").read_text(encoding="utf-8"))["config"]["name"] == study().name
