"""Tables and verdicts made from recorded runs, and the performance page that holds some of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.record import RESULTS
from benchmarks.harness.rounds import figures, figures_of_starts, in_turn, interval
from benchmarks.report.goals import GOALS, verdicts
from benchmarks.report.summary import BEGIN, END, all_tables, goals, rewritten, section_of
from tests.conftest import PROJECT_ROOT


def figure(*ratios: float) -> dict[str, Any]:
    """One way whose measured ratios to another are these."""
    return asdict(figures([{"it": ratio, "other": 1.0} for ratio in ratios], "other")["it"])


def records_that_measured(*ratios: float) -> dict[str, Any]:
    """Records with these ratios under every goal."""
    records: dict[str, Any] = {}
    for goal in GOALS:
        place = records.setdefault(goal.record, {})
        for key in goal.path[:-1]:
            place = place.setdefault(key, {})
        place[goal.path[-1]] = figure(*ratios)
    return records


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_readme_shows_the_committed_records(folder: Path) -> None:
    readme = PROJECT_ROOT / "docs" / "performance.md"
    text = readme.read_text(encoding="utf-8")
    assert rewritten(text, folder.name, section_of(folder, readme)) == text, "run `make readme-performance`"


def test_a_goal_is_held_or_missed_only_where_the_whole_interval_is_on_one_side_of_its_bound() -> None:
    for goal in GOALS:
        (verdict,) = (one for one in verdicts(records_that_measured(goal.bound)) if one.goal == goal)
        assert verdict.state == "held"
        (around,) = (
            one
            for one in verdicts(records_that_measured(*(goal.bound * part for part in (0.9, 0.99, 1.01, 1.02, 1.1))))
            if one.goal == goal
        )
        assert around.ratio is not None
        assert around.ratio > around.goal.bound
        assert around.state == "undecided"
    low = verdicts(records_that_measured(*[0.5] * 5))
    assert [one.state for one in low] == ["missed"] * len(GOALS)
    assert [(one.ratio, one.low, one.high) for one in low] == [(0.5, 0.5, 0.5)] * len(GOALS)


def test_a_missed_goal_says_so_and_an_absent_record_that_nothing_was_measured() -> None:
    nothing = all_tables({}).splitlines()[-len(GOALS) :]
    assert [line.split("|")[1].strip() for line in nothing] == ["not measured"] * len(GOALS)
    records = {"scale": records_that_measured(0.9, 0.91, 0.92)["scale"]}
    last = goals(verdicts(records)).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == [
        "missed",
        "10,000 registered directions, against one",
        "≥ 0.97",
        "0.910 (0.900 – 0.920)",
    ]


def test_the_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    begin, end, other = BEGIN.format("cpu"), END.format("cpu"), BEGIN.format("gpu")
    readme = f"{other}\n\nabove\n\n{begin}\n\nold\n\n{end}\n\nbelow\n"
    assert rewritten(readme, "cpu", "new") == f"{other}\n\nabove\n\n{begin}\n\nnew\n\n{end}\n\nbelow\n"
    assert section_of(tmp_path, tmp_path / "README.md") == all_tables({})
    with pytest.raises(ValueError, match="the page lacks the lines"):
        rewritten(f"{other} alone", "gpu", "new")


def test_ways_take_turns_so_that_each_comes_first_and_last() -> None:
    done: list[str] = []

    def doing(name: str) -> Any:
        return lambda: done.append(name) or float(len(done))

    rounds = in_turn({name: doing(name) for name in "abc"}, 6)
    assert ["".join(done[start : start + 3]) for start in range(0, 18, 3)] == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert rounds[1] == {"c": 4.0, "b": 5.0, "a": 6.0}


def test_an_interval_covers_the_median_and_narrows_with_more_rounds() -> None:
    ratios = [0.90, 0.95, 0.97, 0.99, 1.00, 1.01, 1.03, 1.10]
    low, high = interval(ratios)
    assert 0.90 <= low < 0.995 < high <= 1.10
    narrow_low, narrow_high = interval(ratios * 20)
    assert low < narrow_low < 0.995 < narrow_high < high


def test_each_of_several_starts_counts_once() -> None:
    starts = [[{"it": ratio, "other": 1.0} for ratio in ratios] for ratios in ([1.0, 2.0, 6.0], [3.0], [4.0, 4.0])]
    it = figures_of_starts(starts, "other")["it"]
    assert (it.median, it.ratio, it.ratio_low, it.ratio_high, it.ratios) == (3.0, 3.0, 2.0, 4.0, [2.0, 3.0, 4.0])
    assert figures_of_starts(starts[:1], "other") == figures(starts[0], "other")
