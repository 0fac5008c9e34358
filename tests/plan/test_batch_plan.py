"""Single steps and their plans. Whole schedules, token by token: test_batch_plan_machine.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.plans import in_halves
from vllm_steer.plan.batch_plan import BatchPlanner, Entry, Pooling, RequestPlan
from vllm_steer.plan.entry_rows import ABOVE, HELD_SHIFT
from vllm_steer.plan.step_plan import TRACE
from vllm_steer.plan.trace_columns import HELD

LAYERS, REQUESTS, ENTRIES, COLUMNS = 3, 3, 2, 3


STEERED = in_halves(2, prompt=(Entry(0, 1, 2.0, 0.0),), generated=(Entry(1, 1, 2.0, 0.0),))
READ_ALL = in_halves(4, pooling=Pooling((0,), 0, None))


def test_an_engine_without_requests_is_silenced_once_and_then_left_alone() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    assert planner.build(["plain"], [0], [4]) is None
    planner.add("a", STEERED)
    assert planner.build(["a"], [0], [2]) is not None
    planner.remove("a")
    blank = planner.build(["plain"], [4], [1])
    assert blank is not None, "the rows of the step before would stay on the device"
    assert blank.row_of_token_T.tolist() == [-1]
    assert not blank.segment_A2.any()
    assert not blank.flags_L3.any()
    assert planner.build(["plain"], [5], [1]) is None


def test_a_request_s_rows_are_sent_once_and_stay_its_own() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    other = in_halves(2, prompt=(Entry(0, 2, 3.0, 0.0),), generated=(Entry(0, 2, 3.0, 0.0),))
    planner.add("a", STEERED)
    planner.add("b", other)
    planner.add("read", READ_ALL)

    def sent(*steps: tuple[str, int, int]) -> dict[str, tuple[int, int, int, float]]:
        """By request, the first entry of the first row that is sent: row, layer, slot, a."""
        plan = planner.build(*([step[i] for step in steps] for i in range(3)))
        assert plan is not None
        found: dict[str, tuple[int, int, int, float]] = {}
        for row, row_LE3 in plan.new_rows:
            (request_id,) = (one for one, rows in planner.rows().items() if row in rows)
            layer = int(row_LE3[:, 0, 0].argmax())
            slot, a = row_LE3[layer, 0, 0], row_LE3.view(np.float32)[layer, 0, 1]
            found.setdefault(request_id, (row, layer, int(slot), float(a)))
        return found

    first = sent(("a", 0, 2), ("b", 0, 2))
    assert {name: rest for name, (_, *rest) in first.items()} == {"a": [0, 1, 2.0], "b": [0, 2, 3.0]}
    assert not sent(("a", 2, 1), ("b", 2, 1))
    assert not sent(("read", 0, 2), ("a", 3, 1), ("b", 3, 1))  # a request that steers nothing has no row
    assert not sent(("b", 4, 1), ("a", 4, 1))
    assert not sent(("b", 5, 1))
    planner.remove("b")
    planner.add("b", in_halves(2, prompt=(Entry(0, 2, 4.0, 0.0),)))  # the same id, another request
    assert sent(("b", 0, 2)) == {"b": (first["b"][0], 0, 2, 4.0)}
    planner.preempt("a")
    assert sent(("a", 0, 2))["a"][1:] == (0, 1, 2.0)


def test_rows_of_a_request_that_is_not_in_the_step_are_taken_where_none_is_left() -> None:
    """The request was preempted in a step without tokens, of which the planner did not hear."""
    planner = BatchPlanner(LAYERS, 1, ENTRIES, COLUMNS)
    for name in ("a", "b", "a"):
        if name not in planner.requests:
            planner.add(name, STEERED)
        plan = planner.build([name], [0], [2])
        assert plan is not None
        assert [row for row, _ in plan.new_rows] == [0, 1]
        assert plan.row_of_token_T.tolist() == [0, 0]


def test_a_steady_decode_is_planned_as_if_it_were_not() -> None:
    """Prompts end, readouts begin and end, a request leaves, one comes and one waits, while the others go on by one."""
    plans = {
        "generated": in_halves(3, generated=(Entry(1, 1, 2.0, 0.0),), pooling=Pooling((0, 2), 3, None)),
        "prompt": in_halves(3, prompt=(Entry(0, 1, 2.0, 0.0),), pooling=Pooling((0,), 1, 3)),
        "all": in_halves(5, (Entry(0, 1, 2.0, 0.0),), (Entry(0, 1, 2.0, 0.0),), Pooling((1,), 0, None)),
        "windows": RequestPlan(((0, ()), (2, (Entry(0, 1, 2.0, 0.0),)), (6, ()), (9, (Entry(1, 1, 1.0, 0.0),)))),
        "late": in_halves(2, generated=(Entry(2, 0, 1.0, -1.0),), pooling=Pooling((2,), 4, 6)),
    }
    steps = [(names, i) for i in range(12) for names in [["plain", *plans]]]
    steps += [(["plain", "all", "generated"], i) for i in range(12, 16)] + [(["all", "generated"], 16)]
    reused = 0

    def run(is_reusing: bool) -> list[object]:
        nonlocal reused
        planner = BatchPlanner(LAYERS, 6, ENTRIES, COLUMNS)
        for name, plan in plans.items():
            planner.add(name, plan)
        seen: list[object] = []
        for names, position in steps:
            if not is_reusing:
                planner._settled = None
            before = planner._settled
            built = planner.build(names, [position] * len(names), [1] * len(names))
            assert built is not None
            reused += before is not None and built is before.plan
            tables = (built.row_of_token_T, built.keep_A, built.segment_A2, built.flags_L3)
            seen.append([table.tolist() for table in tables])
            seen.append({name: replace(state) for name, state in planner.poolings.items()})
        return seen

    assert run(is_reusing=True) == run(is_reusing=False)
    assert reused >= 7, "nothing was reused, so nothing was compared"


def test_a_chunk_across_the_end_of_the_prompt_is_split_token_by_token() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("a", STEERED)
    plan = planner.build(["plain", "a"], [7, 0], [2, 5])
    assert plan is not None
    rows = plan.row_of_token_T.tolist()
    assert rows[:2] == [-1, -1]
    assert rows[2] == rows[3] != rows[4]
    assert rows[4] == rows[5] == rows[6] >= 0


def test_each_token_uses_the_row_of_its_own_window_however_the_request_is_cut() -> None:
    starts, length = (0, 2, 3, 7, 10), 13
    windows = tuple((start, (Entry(0, 1, float(n), 0.0),) if n % 2 else ()) for n, start in enumerate(starts))
    expected = [max(n for n, start in enumerate(starts) if start <= position) for position in range(length)]
    for chunk in range(1, length + 1):
        planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS, max_windows=2)
        planner.add("a", RequestPlan(windows))
        rows: list[int] = []
        for computed in range(0, length, chunk):
            plan = planner.build(["plain", "a"], [0, computed], [1, min(chunk, length - computed)])
            assert plan is not None
            rows += plan.row_of_token_T[1:].tolist()
        lent = planner.rows()["a"]
        assert [row < 0 for row in lent] == [True, False, True, False, True]
        assert rows == [lent[n] for n in expected]


@pytest.mark.parametrize(
    ("computed", "named"),
    [(5, "token 5 where token 2"), (1, "token 1 where token 2")],
    ids=["tokens skipped", "tokens repeated"],
)
def test_a_gap_in_the_positions_fails_the_readout_with_a_reason(computed: int, named: str) -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("a", READ_ALL)
    planner.build(["a"], [0], [2])
    assert planner.poolings["a"].failure is None
    plan = planner.build(["a"], [computed], [1])
    failure = planner.poolings["a"].failure
    assert failure is not None
    assert named in failure
    assert plan is not None
    assert not plan.segment_A2.any()
    planner.build(["a"], [computed + 1], [1])
    assert planner.poolings["a"].failure == failure, "going on without another gap does not mend it"


def test_a_first_chunk_behind_position_0_fails_the_readout() -> None:
    """It means that cached KV replaced the tokens before it."""
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("a", READ_ALL)
    planner.build(["a"], [2], [2])
    assert "token 2 where token 0" in (planner.poolings["a"].failure or "")


def test_a_failed_readout_is_whole_again_after_a_preemption() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("a", READ_ALL)
    planner.build(["a"], [1], [2])
    planner.preempt("a")
    plan = planner.build(["a"], [0], [3])
    state = planner.poolings["a"]
    assert plan is not None
    assert plan.keep_A[state.accumulator] == 0
    assert (state.failure, state.num_tokens, state.next_position) == (None, 3, 3)


def test_a_freed_accumulator_is_reset_for_the_next_readout() -> None:
    planner = BatchPlanner(LAYERS, 1, ENTRIES, COLUMNS)
    for name in ("a", "b"):
        planner.add(name, READ_ALL)
        first, second = planner.build([name], [0], [2]), planner.build([name], [2], [2])
        assert first is not None
        assert second is not None
        assert (first.keep_A.tolist(), second.keep_A.tolist()) == ([0.0], [1.0])
        planner.remove(name)


def test_a_span_that_begins_in_a_later_chunk_is_reset_there_and_once() -> None:
    planner = BatchPlanner(LAYERS, 1, ENTRIES, COLUMNS)
    planner.add("a", in_halves(6, pooling=Pooling((0,), 3, 6)))
    built = [planner.build(["a"], [computed], [2]) for computed in (0, 2, 4)]
    assert [plan.keep_A.tolist() for plan in built if plan is not None] == [[1.0], [0.0], [1.0]]
    assert planner.poolings["a"].num_tokens == 3


def test_removing_or_preempting_a_request_that_never_ran_is_harmless() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("a", READ_ALL)
    planner.preempt("a")
    planner.remove("a")
    planner.remove("unknown")
    assert sorted(planner._free_accumulators) == list(range(REQUESTS))


def test_columns_of_traces_watches_and_counted_conditions_come_in_this_order() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("other", replace(READ_ALL, pooling=Pooling((0,), 0, None, watch=((2, 8),), watch_first=4)))
    counted = Entry(0, 1, 2.0, 0.0, ABOVE | 1 << HELD_SHIFT, 3, 0.5)
    pooling = Pooling((0,), 0, None, ((1, 7),), ((2, 8),), watch_first=4, held=((HELD, 0),))
    planner.add("a", replace(in_halves(4, prompt=(counted,)), pooling=pooling))
    assert planner.columns == {"other": (0,), "a": (1, 0, 2)}
    plan = planner.build(["a"], [0], [5])
    assert plan is not None
    ((_, row_LE8),) = plan.new_rows
    assert row_LE8[0, 0, 3] == ABOVE | (2 + 1) << HELD_SHIFT
    assert [(one.position, one.count) for one in plan.traced] == [(0, 5)]
    assert [(one.position, one.count) for one in plan.watched] == [(4, 1)]
    assert plan.flags_L3[:, TRACE].tolist() == [0, 1, 1]
    planner.remove("a")
    planner.remove("other")
    planner.add("counts", replace(READ_ALL, pooling=Pooling((), 0, None, held=((HELD, 0), (HELD, 1), (HELD, 2)))))
    plan = planner.build(["counts"], [0], [2])
    assert plan is not None
    assert len(plan.traced) == 1
    assert not plan.flags_L3.any(), "the entries themselves write these columns"


def test_watched_tokens_are_told_in_each_step_from_the_first_generated_one_on() -> None:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, COLUMNS)
    planner.add("a", RequestPlan(pooling=Pooling((0,), 0, None, watch=((1, 2),), watch_first=4)))

    def watched(computed: int, scheduled: int) -> list[tuple[int, int, int]]:
        plan = planner.build(["a"], [computed], [scheduled])
        assert plan is not None
        assert plan.flags_L3[:, TRACE].tolist() == [0, int(bool(plan.watched)), 0]
        return [(one.token, one.position, one.count) for one in plan.watched]

    # The prompt's last tokens come one by one, as in an engine with little room: those plans could be used again.
    assert [watched(*step) for step in ((0, 2), (2, 1), (3, 1))] == [[], [], []]
    assert [watched(position, 1) for position in (4, 5, 6)] == [[(0, position, 1)] for position in (4, 5, 6)]
    planner.preempt("a")
    assert watched(0, 7) == [(4, 4, 3)]
