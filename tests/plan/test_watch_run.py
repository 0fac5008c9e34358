"""A watch holds with the right token, however its values are cut into steps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.plan.watch_run import WatchRun


def watch(bound: float, patience: int, *, is_above: bool = True) -> SimpleNamespace:
    return SimpleNamespace(bound=bound, patience=patience, is_above=is_above)


@given(
    values=st.lists(st.sampled_from([-1.0, 0.5, 2.0, float("nan")]), max_size=12),
    cuts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=8),
    patience=st.integers(1, 3),
    is_above=st.booleans(),
)
def test_cuts_and_repeats_change_nothing(
    values: list[float], cuts: list[tuple[int, int]], patience: int, is_above: bool
) -> None:
    beyond = [value > 0.5 if is_above else value < 0.5 for value in values]
    windows = [at + patience - 1 for at in range(len(values) - patience + 1) if all(beyond[at : at + patience])]
    run, held, seen = WatchRun(watch(0.5, patience, is_above=is_above), first=10), None, 0
    for size, again in [*cuts, (len(values), 0)]:
        start, end = max(seen - again, 0), min(seen + size, len(values))
        held = run.see(10 + start, values[start:end])
        seen = max(seen, end)
        if held is not None:
            break
    assert held == (10 + windows[0] if windows else None)


def test_a_bound_is_compared_as_the_float32_that_values_are() -> None:
    third = float(np.float32(1 / 3))  # a little above 1/3
    assert third > 1 / 3
    assert WatchRun(watch(1 / 3, 1)).see(0, [third]) is None
