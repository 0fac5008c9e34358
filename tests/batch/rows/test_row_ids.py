"""A set of row ids knows the ids that it was made of, and no others."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa

from batch_jobs.rows.row_ids import RowIds, keys_of


def test_a_set_holds_its_ids_and_no_others() -> None:
    draw = random.Random(0)
    ids = [f"{draw.getrandbits(64):016x}" for _ in range(2000)] + ["0" * 16, "f" * 16, "r0", "", "F" * 16, "ü"]
    draw.shuffle(ids)
    inside = set(ids[:1000])
    found = RowIds(inside)
    assert len(found) == 1000
    assert [one in found for one in ids] == [one in inside for one in ids]
    assert found.holds(keys_of(pa.array(ids))).tolist() == [one in inside for one in ids]
    assert "absent" not in found
    assert "x" not in RowIds()


def test_ids_have_one_key_whatever_they_are_read_with() -> None:
    ids = pa.array(["00000000000000ff", "abcdefabcdefabcd", "r1"])
    together = keys_of(ids)
    assert together[:2].tolist() == [0xFF, 0xABCDEFABCDEFABCD]
    assert [int(keys_of(ids[place : place + 1])[0]) for place in range(3)] == together.tolist()
    assert keys_of(pa.chunked_array([ids[:2], ids[2:]])).tolist() == together.tolist()
    assert keys_of(pa.chunked_array([], pa.string())).tolist() == []


def test_sets_are_joined_and_compared() -> None:
    assert RowIds("ab") | RowIds("bc") == RowIds("cab") == RowIds.of_keys([keys_of(pa.array(["c", "b", "a", "a"]))])
    assert RowIds("ab") != RowIds("a")
    assert RowIds("ab") | RowIds() == RowIds() | RowIds("ab") == RowIds("ab")
    assert RowIds("ab").meets(RowIds("bc"))
    assert not RowIds("ab").meets(RowIds("c"))
    assert np.unique(keys_of(pa.array(list("aab")))).size == len(RowIds("aab")) == 2
