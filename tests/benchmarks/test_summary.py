"""Tables and verdicts made from recorded runs, and the performance page that holds some of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import record
from benchmarks.harness.record import RESULTS
from benchmarks.harness.rounds import figures, figures_of_starts, in_turn, interval
from benchmarks.report.goals import CPU_GOALS, GPU_GOALS, Goal, Verdict, verdicts
from benchmarks.report.summary import BEGIN, END, all_tables, goals, rewritten, section_of
from benchmarks.report.tables import ratio
from tests.conftest import PROJECT_ROOT


def figure(*ratios: float) -> dict[str, Any]:
    """One way whose measured ratios to another are these."""
    return asdict(figures([{"it": ratio, "other": 1.0} for ratio in ratios], "other")["it"])


ALL_GOALS = (*CPU_GOALS, *GPU_GOALS)


def verdict_on(goal: Goal, *measured: float) -> Verdict:
    """The verdict on a goal whose record holds these measurements."""
    record: dict[str, Any] = {}
    place = record
    for key in goal.path[:-1]:
        place = place.setdefault(key, {})
    place[goal.path[-1]] = list(measured) if goal.unit else figure(*measured)
    (verdict,) = verdicts({goal.record: record}, [goal])
    return verdict


@pytest.mark.parametrize("folder", sorted(RESULTS.iterdir()), ids=lambda folder: folder.name)
def test_readme_shows_the_committed_records(folder: Path) -> None:
    readme = PROJECT_ROOT / "docs" / "performance.md"
    text = readme.read_text(encoding="utf-8")
    assert rewritten(text, folder.name, section_of(folder, readme)) == text, "run `make readme-performance`"


@pytest.mark.parametrize(
    ("row", "way", "columns"),
    [
        ("installed, not configured, against plain vLLM", "installed", 2),
        ("configured for 5 layers, idle", "idle", 2),
        ("all requests steered, every α different", "steered", 2),
        ("all requests steered, 8 directions at each of 5 layers", "stacked", 2),
        ("all prompts read at 5 layers", "prompt read", 2),
        ("all read at all layers, prompts and answers", "read, all layers", 1),
    ],
)
def test_the_front_page_says_what_the_records_say(row: str, way: str, columns: int) -> None:
    (line,) = [
        line for line in (PROJECT_ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith(f"| {row} |")
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")[1:]]
    for folder, cell in zip(("cpu", "gpu")[:columns], cells, strict=False):
        measured = record.read(RESULTS / folder / "overhead.json")["generated"]["64"]["throughput"][way]
        assert cell == ratio(measured, 3)


@pytest.mark.parametrize("goal", ALL_GOALS, ids=lambda goal: f"{goal.record}: {goal.text}")
def test_a_goal_is_held_or_missed_only_where_the_whole_interval_is_on_one_side_of_its_bound(goal: Goal) -> None:
    assert verdict_on(goal, goal.bound).state == "held"
    around = verdict_on(goal, *(goal.bound * part for part in (0.9, 0.95, 0.99, 1.01, 1.02, 1.05, 1.1)))
    assert around.low < goal.bound < around.high
    assert around.state == "undecided"
    low, high = (verdict_on(goal, *[goal.bound * part] * 5) for part in (0.5, 2.0))
    assert [low.state, high.state] == (["held", "missed"] if goal.is_most else ["missed", "held"])
    assert (low.measured, low.low, low.high) == pytest.approx([goal.bound / 2] * 3)


def test_a_goal_with_a_floor_is_held_where_the_figure_reaches_the_bound_and_the_interval_the_floor() -> None:
    goal = Goal("it", "record", ("it",), 0.98, low=0.96)
    assert verdict_on(goal, 0.97, 0.975, 0.99, 1.0, 1.01).state == "held"
    assert verdict_on(goal, 0.95, 0.955, 0.99, 1.0, 1.01).state == "undecided"
    assert verdict_on(goal, 0.97, 0.971, 0.975, 0.99, 1.0).state == "undecided"


def test_a_missed_goal_says_so_and_an_absent_record_that_nothing_was_measured() -> None:
    nothing = all_tables({}, CPU_GOALS).splitlines()[-len(CPU_GOALS) :]
    assert [line.split("|")[1].strip() for line in nothing] == ["not measured"] * len(CPU_GOALS)
    ratio, seconds = Goal("slow", "a", ("it",), 0.97), Goal("long", "a", ("it",), 45.0, is_most=True, unit="s")
    lines = goals([verdict_on(ratio, 0.9, 0.91, 0.92), verdict_on(seconds, 50.0)]).splitlines()[-2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["missed", "slow", "≥ 0.97", "0.910 (0.900 – 0.920)"],
        ["missed", "long", "≤ 45 s", "50.0 s"],
    ]


def test_the_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    begin, end, other = BEGIN.format("cpu"), END.format("cpu"), BEGIN.format("gpu")
    readme = f"{other}\n\nabove\n\n{begin}\n\nold\n\n{end}\n\nbelow\n"
    assert rewritten(readme, "cpu", "new") == f"{other}\n\nabove\n\n{begin}\n\nnew\n\n{end}\n\nbelow\n"
    assert section_of(tmp_path, tmp_path / "README.md") == all_tables({}, CPU_GOALS)
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
