"""Columns of the trace buffer: shared by requests that trace the same, given back by the last of them."""

from __future__ import annotations

from vllm_steer.plan.trace_columns import HELD, TraceColumns


def test_requests_that_trace_the_same_share_a_column_until_the_last_ends() -> None:
    columns = TraceColumns(num_layers=2, num_columns=2)
    kind, cold, bold = (0, 5), (1, 5), (1, 6)
    shared = columns.bind("a", [kind])
    assert columns.bind("b", [cold, kind]) is not None
    assert shared is not None
    assert columns.bind("c", [bold]) is None
    columns.release("a", [kind])
    assert columns.bind("c", [bold]) is None, "a column that b still uses was given away"
    columns.release("b", [cold, kind])
    assert columns.bind("c", [bold, cold]) is not None
    assert columns.bind("d", [kind]) is None


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    columns = TraceColumns(num_layers=1, num_columns=2)
    assert columns.bind("large", [(0, 1), (0, 2), (0, 3)]) is None
    assert columns.take_changes() is None
    columns.release("large", [(0, 1), (0, 2), (0, 3)])
    assert columns.bind("fits", [(0, 1), (0, 2)]) is not None


def test_the_table_names_each_column_s_slot_at_its_layer_and_is_given_once() -> None:
    columns = TraceColumns(num_layers=3, num_columns=2)
    assert columns.take_changes() is None
    bound = columns.bind("a", [(2, 7), (0, 4)])
    assert bound is not None
    table = columns.take_changes()
    assert table is not None
    assert (table >= 0).sum() == 2
    assert (table[2, bound[0]], table[0, bound[1]]) == (7, 4)
    columns.bind("b", [(0, 4)])
    assert columns.take_changes() is None
    columns.release("a", [(2, 7), (0, 4)])
    table = columns.take_changes()
    assert table is not None
    assert table[0, bound[1]] == 4
    assert (table >= 0).sum() == 1


def test_an_engine_without_columns_traces_nothing() -> None:
    assert TraceColumns(num_layers=1, num_columns=0).bind("a", [(0, 0)]) is None


def test_conditions_of_one_number_share_a_column_that_no_direction_is_written_to() -> None:
    columns = TraceColumns(num_layers=2, num_columns=2)
    assert columns.bind("a", [(HELD, 0)]) == columns.bind("b", [(HELD, 0)]) == (0,)
    assert columns.take_changes() is None
    assert columns.bind("c", [(1, 7)]) == (1,)
    assert columns.bind("d", [(HELD, 1)]) is None
    columns.take_changes()
    columns.release("a", [(HELD, 0)])
    columns.release("b", [(HELD, 0)])
    assert columns.take_changes() is None
    assert columns.bind("d", [(HELD, 1)]) == (0,)
