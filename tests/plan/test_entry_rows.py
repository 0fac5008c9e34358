"""Entries as bytes, and the rows of the entry table that they become."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.plan.batch_plan import RequestPlan
from vllm_steer.plan.entry_rows import (
    ABOVE,
    BELOW,
    HELD_SHIFT,
    MOST_PROBES,
    PROMPT,
    STORED,
    Entry,
    EntryRows,
    pack,
    slots_of,
    unpack,
)

LAYERS, MOST, PLACE, COLUMNS = 3, 4, 5, {0: 7, 2: 1}

floats = st.floats(width=32, allow_nan=False)
modes = st.sampled_from([0, 1, 4, ABOVE, BELOW | STORED, ABOVE | PROMPT, ABOVE | 1 << HELD_SHIFT, 3 << HELD_SHIFT])
one_entry = st.builds(
    Entry, st.integers(0, LAYERS - 1), st.integers(0, 999), floats, floats, modes, st.integers(0, 3), floats
)
some = st.lists(one_entry, max_size=MOST)


@given(some)
def test_packed_entries_come_back_sorted_by_layer(entries: list[Entry]) -> None:
    assert unpack(pack(entries)) == sorted(entries, key=lambda one: one.layer_index)
    assert bool(pack(entries)) == bool(entries)
    packed = RequestPlan(((0, entries), (3, pack(entries))))
    assert packed == RequestPlan(((0, pack(entries)), (3, entries)))


@given(some)
def test_slots_are_those_of_directions_and_of_conditions_on_the_stream_of_the_entry(entries: list[Entry]) -> None:
    slots = {one.slot for one in entries}
    for one in entries:
        if one.mode & (ABOVE | BELOW) and not one.mode & (STORED | PROMPT):
            slots.add(one.gate)
    assert slots_of(pack(entries)) == slots


@given(some.filter(bool))
def test_a_row_holds_the_entries_of_each_layer_from_the_left(entries: list[Entry]) -> None:
    rows = EntryRows(LAYERS, 2, MOST, 2)
    lent = rows.lend("a", [b"", pack(entries)], ["a"], PLACE, COLUMNS)
    ((row, row_LE8),) = rows.take_changes()
    assert lent == (-1, row)
    for layer in range(LAYERS):
        own = [one for one in entries if one.layer_index == layer]
        assert rows.depth([row])[layer] == len(own)
        for number, (slot, _, _, mode, gate, *_) in enumerate(row_LE8[layer].tolist()):
            if number >= len(own):
                assert slot == -1
                continue
            one = own[number]
            held = COLUMNS.get((one.mode >> HELD_SHIFT) - 1, -1) + 1 if one.mode >> HELD_SHIFT else 0
            assert (slot, mode) == (one.slot, one.mode % (1 << HELD_SHIFT) + (held << HELD_SHIFT))
            assert gate == one.gate + (MOST_PROBES * PLACE if one.mode & PROMPT else 0)
            numbers = row_LE8.view(np.float32)[layer, number, [1, 2, 5]]
            assert numbers.tolist() == [one.a, one.b, one.threshold]


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_is_not_there_is_an_error_and_no_other_layers_entry(layer: int) -> None:
    with pytest.raises(IndexError):
        EntryRows(LAYERS, 2, MOST, 2).lend("a", [pack([Entry(layer, 0, 1.0, 0.0)])], ["a"])


def test_more_entries_than_a_layer_has_room_for_are_an_error_and_not_the_next_layers() -> None:
    with pytest.raises(IndexError, match="entry 4 at layer index 1, of 4"):
        EntryRows(LAYERS, 2, MOST, 2).lend("a", [pack([Entry(1, 0, 1.0, 0.0)] * (MOST + 1))], ["a"])


def test_a_number_that_float32_does_not_hold_is_not_packed() -> None:
    with pytest.raises(OverflowError):
        pack([Entry(0, 0, 1e39, 0.0)])
