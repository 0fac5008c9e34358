"""Which KV blocks have sums, in which slots, and how far a reader may go with them."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_steer.plan import block_sums
from vllm_steer.plan.block_sums import MOST_SLOTS, BlockSums, Reader, StepBlocks, num_slots

BLOCK = 4


def reader(
    text: str, prompt_len: int, first: int = 0, end: int | None = None, layers: tuple[int, ...] = (0,)
) -> Reader:
    """A reader of a prompt that is the beginning of a text; a hash stands for everything up to the block's end."""
    hashes = [(text, stop) for stop in range(BLOCK, prompt_len + 1, BLOCK)]
    return Reader(hashes, first, end, prompt_len, frozenset(layers))


def compute(sums: BlockSums, name: str, one: Reader, chunks: list[int], cached: int = 0) -> list[StepBlocks | None]:
    """Let a reader begin behind ``cached`` tokens and compute chunks, each in a step of its own."""
    assert sums.begin(name, one, cached)
    steps = []
    for chunk in chunks:
        steps.append(sums.schedule({name: (cached, chunk)}, []))
        cached += chunk
    return steps


def parts_of(steps: list[StepBlocks | None], name: str) -> list[list[tuple[int, int]]]:
    return [[part[:2] for part in (step or StepBlocks()).parts.get(name, ())] for step in steps]


def in_use(sums: BlockSums) -> list[int]:
    kept = [slot for one in sums._kept.values() for slot in one.slots]
    begun = [slot for one in sums._filling.values() if one.begun for slot in one.begun[1]]
    return kept + begun


def assert_no_slot_is_lost(sums: BlockSums) -> None:
    assert sorted(in_use(sums) + sums._free) == list(range(sums._num_slots))


def test_a_reader_reaches_as_far_as_there_are_sums() -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 14)
    assert sums.reach(one, 14) == 0
    (step,) = compute(sums, "r", one, [14])
    assert step is not None
    assert [part[:2] for part in step.parts["r"]] == [(0, 4), (4, 8), (8, 12)]
    assert sums.reach(one, 14) == 12
    assert sums.reach(reader("a", 9), 9) == 8
    assert sums.reach(reader("b", 14), 14) == 0
    (again,) = compute(sums, "s", one, [2], cached=12)
    assert again == StepBlocks(loads={"s": tuple(slot for *_, slot in step.parts["r"])})
    assert_no_slot_is_lost(sums)


@pytest.mark.parametrize("chunks", [[1] * 13, [5, 5, 3], [7, 6], [13]])
def test_a_block_that_is_computed_in_several_steps_has_several_sums(chunks: list[int]) -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 13, first=2)
    steps = compute(sums, "r", one, chunks)
    found = [part for step in parts_of(steps, "r") for part in step]
    assert [at for part in found for at in range(*part)] == list(range(2, 12))
    (step,) = compute(sums, "s", one, [1], cached=12)
    assert step is not None
    slots = [slot for one_step in steps if one_step is not None for *_, slot in one_step.parts.get("r", ())]
    assert list(step.loads["s"]) == slots
    assert_no_slot_is_lost(sums)


@pytest.mark.parametrize(
    ("first", "end", "reach"),
    [
        (0, None, 16),
        (2, None, 2),  # its first block's part differs
        (4, None, 16),
        (9, None, 9),
        (0, 16, 18),  # the tokens behind the span need no sums
        (0, 8, 18),
        (0, 7, 4),  # its last block's part differs
        (17, None, 17),
        (20, None, 18),
    ],
)
def test_a_sum_is_of_one_part_of_a_block(first: int, end: int | None, reach: int) -> None:
    sums = BlockSums(BLOCK, 100)
    compute(sums, "r", reader("a", 18), [18])
    other = reader("a", 18, first, end)
    assert sums.reach(other, 18) == reach
    cached = min(reach, 17) // BLOCK * BLOCK
    compute(sums, "s", other, [18 - cached], cached=cached)
    assert sums.reach(other, 18) == (18 if end is not None or first == 20 else max(16, first))
    assert_no_slot_is_lost(sums)


def test_sums_at_more_layers_serve_readers_of_fewer() -> None:
    sums = BlockSums(BLOCK, 100)
    both, left, right = (reader("a", 9, layers=layers) for layers in ((0, 1), (0,), (1,)))
    compute(sums, "l", left, [9])
    assert [sums.reach(one, 9) for one in (both, left, right)] == [0, 8, 0]
    compute(sums, "r", right, [9])
    assert [sums.reach(one, 9) for one in (both, left, right)] == [0, 8, 8]
    compute(sums, "b", both, [9])
    assert [sums.reach(one, 9) for one in (both, left, right)] == [8, 8, 8]
    assert len(sums) == 2, "those at fewer layers are of no more use"
    assert_no_slot_is_lost(sums)


def test_only_tokens_of_the_prompt_are_summed() -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 6)
    hashes: Any = one.hashes
    steps = compute(sums, "r", one, [6])
    hashes.append(("a", 8))  # its first generated tokens have filled the block
    steps += [sums.schedule({"r": (6, 2)}, [])]
    assert parts_of(steps, "r") == [[(0, 4)], []]
    assert sums.followed == []
    assert sums.reach(one, 9) == 4


def test_a_hit_that_ends_within_a_block_has_no_sums() -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 14)
    compute(sums, "r", one, [14])
    assert not sums.begin("s", one, 10)
    assert not sums.begin("s", reader("a", 14, first=6), 8)
    assert sums.begin("s", reader("a", 14, end=8), 10), "the span is over there"
    assert sums.begin("s", reader("a", 14, first=10), 10), "it begins there"


def test_a_reader_that_is_not_in_the_step_after_all_has_not_begun() -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 9)
    assert sums.begin("r", one, 0)
    assert sums.schedule({}, []) is None
    assert sums.followed == []
    assert sums.begin("r", one, 0)
    assert sums.schedule({"r": (4, 5)}, []) is None, "it has begun elsewhere"
    assert sums.reach(one, 9) == 0


def test_a_preempted_or_ended_reader_leaves_no_half_sum() -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 13)
    compute(sums, "r", one, [6])
    assert len(in_use(sums)) == 2
    compute(sums, "r", one, [4], cached=4)  # it comes back
    assert_no_slot_is_lost(sums)
    assert sums.reach(one, 13) == 8
    compute(sums, "s", reader("b", 13), [6])
    sums.schedule({}, ["s"])
    assert sums.followed == ["r"]
    assert len(in_use(sums)) == 3
    assert_no_slot_is_lost(sums)


def test_the_last_blocks_of_the_prompt_that_was_used_least_recently_make_room() -> None:
    sums = BlockSums(BLOCK, 7)
    a, b = reader("a", 17), reader("b", 17)
    compute(sums, "1", a, [17])
    compute(sums, "2", b, [17])
    assert (sums.reach(a, 17), sums.reach(b, 17)) == (12, 16)
    compute(sums, "3", a, [5], cached=12)
    assert (sums.reach(a, 17), sums.reach(b, 17)) == (16, 12)
    assert_no_slot_is_lost(sums)


def test_a_prompt_with_more_blocks_than_slots_keeps_its_first_ones() -> None:
    sums = BlockSums(BLOCK, 3)
    one = reader("a", 30)
    compute(sums, "0", reader("b", 9), [9])
    steps = compute(sums, "r", one, [10, 10, 10])
    assert parts_of(steps, "r") == [[(0, 4), (4, 8), (8, 10)], [], []]
    assert sums.reach(one, 30) == 8
    assert_no_slot_is_lost(sums)


def test_no_slot_is_written_twice_in_a_step() -> None:
    sums = BlockSums(BLOCK, 3)
    for name in "abc":
        assert sums.begin(name, reader(name, 9), 0)
    step = sums.schedule(dict.fromkeys("abc", (0, 9)), [])
    assert step is not None
    slots = [slot for parts in step.parts.values() for *_, slot in parts]
    assert len(slots) == len(set(slots)) == 3


def test_equal_prompts_in_one_step_are_summed_once() -> None:
    sums = BlockSums(BLOCK, 100)
    for name in "ab":
        assert sums.begin(name, reader("same", 9), 0)
    step = sums.schedule(dict.fromkeys("ab", (0, 9)), [])
    assert step is not None
    assert set(step.parts) == {"a"}


def test_no_step_has_more_segments_than_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sums, "MOST_SEGMENTS", 2)
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 25)
    steps = compute(sums, "r", one, [13, 12])
    assert parts_of(steps, "r") == [[(0, 4), (4, 8)], [(16, 20), (20, 24)]]
    assert sums.reach(one, 25) == 8
    assert_no_slot_is_lost(sums)


def test_cleared_sums_are_gone() -> None:
    sums = BlockSums(BLOCK, 100)
    one = reader("a", 14)
    compute(sums, "r", one, [10])
    sums.clear()
    assert len(sums) == 0
    assert sums.reach(one, 14) == 0
    assert sums.schedule({"r": (10, 4)}, []) is None, "the rest of what was begun before"
    assert_no_slot_is_lost(sums)


def test_slots_fit_into_the_memory() -> None:
    assert num_slots(0, 3, 64) == 0
    assert num_slots(1, 2, 64) == (1 << 20) // (2 * 64 * 4 * 2)
    assert num_slots(1 << 20, 1, 1) == MOST_SLOTS
