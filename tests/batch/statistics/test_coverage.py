"""Intervals hold the true value as often as they say, and tests reject a true null no more often than they say."""

from __future__ import annotations

import pytest

from tests.support.statistics_table import BEGIN, END, PAGE, lines, table


@pytest.mark.slow
def test_intervals_cover_and_tests_reject_as_often_as_they_say() -> None:
    found = {(line.what, line.design): line for line in lines()}
    assert len(found) == len(lines())
    wrong = {key: line.share for key, line in found.items() if not line.low <= line.share <= line.high}
    assert not wrong
    covering = [line.share for line in lines() if line.kind == "covers"]
    # over all designs the noise of a line averages out
    assert 0.935 < sum(covering) / len(covering) < 0.975


@pytest.mark.slow
def test_the_page_has_the_simulated_table() -> None:
    assert f"{BEGIN}{table()}{END}" in PAGE.read_text(encoding="utf-8"), "run python -m tests.support.statistics_table"
