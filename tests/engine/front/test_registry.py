"""The book of slots: all or none, old content kept for requests in flight, names found or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_steer.directions import Direction, save_directions
from vllm_steer.engine import registry as registry_module
from vllm_steer.engine.registry import DirectionRegistry, bank_writes, check_room, registration_memory
from vllm_steer.errors import AmbiguousDirection, BankFull, SteerError, UnknownDirection, WrongDimension
from vllm_steer.settings import SteerSettings

SIZE = 4


def direction(name: str, layer: int, value: float = 1.0, size: int = SIZE) -> Direction:
    return Direction(name, layer, np.full(size, value, np.float32))


def book(registry: DirectionRegistry) -> list[tuple[str, int, int, str]]:
    return [(one.name, one.layer, one.slot, one.content_hash) for one in registry.all()]


def test_each_new_direction_gets_a_slot_of_its_own() -> None:
    registry = DirectionRegistry(4, SIZE)
    writes = registry.register([direction("a", 1), direction("a", 2), direction("b", 1)])
    assert [one.key for _, one in writes] == ["a@1", "a@2", "b@1"]
    slots = [slot for slot, _ in writes]
    assert len(set(slots)) == 3
    assert set(slots) <= set(range(4))
    assert [one.slot for one in registry.all()] == slots
    assert registry.find("a", 2, range(99)).content_hash == direction("a", 2).content_hash


def test_two_registries_agree_on_the_slots_of_the_same_directions() -> None:
    """Front end and workers assign slots to the configured files without communicating."""
    these = [direction("b", 2), direction("a", 1), direction("b", 1, 2.0)]
    assert DirectionRegistry(8, SIZE).register(these)[0][0] == DirectionRegistry(8, SIZE).register(these)[0][0]
    first, second = DirectionRegistry(8, SIZE), DirectionRegistry(8, SIZE)
    first.register(these)
    second.register(these)
    assert book(first) == book(second)


@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        ([direction("c", 1), direction("d", 1, size=SIZE + 1)], WrongDimension),
        ([direction("c", 1), direction("d", 1), direction("e", 1)], BankFull),
    ],
    ids=["wrong size", "too many"],
)
def test_all_are_registered_or_none(wrong: list[Direction], refusal: type[SteerError]) -> None:
    registry = DirectionRegistry(3, SIZE)
    registry.register([direction("a", 1)])
    before = book(registry)
    with pytest.raises(SteerError) as caught:
        registry.register(wrong)
    assert type(caught.value) is refusal
    assert book(registry) == before
    assert len(registry.register([direction("c", 1), direction("d", 1)])) == 2, "a slot was lost to the refused call"


def test_refusals_say_what_was_got_and_what_is_allowed() -> None:
    registry = DirectionRegistry(1, SIZE)
    with pytest.raises(WrongDimension, match=r"'a@1' has 5 elements; allowed: 4"):
        registry.register([direction("a", 1, size=5)])
    with pytest.raises(BankFull, match=r"2 new directions, and 1 of 1 slots"):
        registry.register([direction("a", 1), direction("b", 1)])


def test_the_same_content_is_not_written_again() -> None:
    registry = DirectionRegistry(1, SIZE)
    registry.register([direction("a", 1)])
    assert registry.register([direction("a", 1)]) == []


def test_of_a_key_given_twice_the_last_counts_and_one_slot_is_used() -> None:
    registry = DirectionRegistry(1, SIZE)
    (write,) = registry.register([direction("a", 1, 1.0), direction("a", 1, 2.0)])
    assert write[1].vector[0] == 2.0


def test_replaced_content_gets_a_new_slot_and_the_old_one_is_kept_until_reclaimed() -> None:
    registry = DirectionRegistry(2, SIZE)
    ((old, _),) = registry.register([direction("a", 1, 1.0)])
    ((new, _),) = registry.register([direction("a", 1, 2.0)])
    assert new != old, "a request in flight would see the new vector"
    assert registry.find("a", None, range(99)).slot == new
    with pytest.raises(BankFull):
        registry.register([direction("b", 1)])
    registry.reclaim()
    ((reused, _),) = registry.register([direction("b", 1)])
    assert reused == old
    registry.reclaim()
    with pytest.raises(BankFull):  # nothing is freed twice
        registry.register([direction("c", 1)])


def test_a_name_is_found_at_its_layer() -> None:
    registry = DirectionRegistry(4, SIZE)
    registry.register([direction("two", 1, 1.0), direction("two", 2, 2.0), direction("one", 3)])
    assert registry.find("two", 1, range(99)).layer == 1
    assert registry.find("two", 2, range(99)).layer == 2
    assert registry.find("one", None, range(99)).layer == 3
    assert registry.find("one", 9, range(99)).layer == 3  # a direction of one layer may be used at another
    assert set(registry.layers_of("two")) == {1, 2}


@pytest.mark.parametrize("layer", [None, 3])
def test_a_name_of_several_layers_is_ambiguous_without_one_of_them(layer: int | None) -> None:
    registry = DirectionRegistry(4, SIZE)
    registry.register([direction("two", 2), direction("two", 1)])
    with pytest.raises(AmbiguousDirection, match=r"'two' belongs to layers \[1, 2\]"):
        registry.find("two", layer, range(99))


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    registry = DirectionRegistry(4, SIZE)
    with pytest.raises(UnknownDirection, match="registered: none"):
        registry.find("a", None, range(99))
    registry.register([direction("b", 1), direction("c", 1)])
    with pytest.raises(UnknownDirection, match="registered: b, c"):
        registry.find("a", 1, range(99))


def test_is_unit_is_booked() -> None:
    registry = DirectionRegistry(4, SIZE)
    registry.register([direction("half", 1, 0.5), direction("one", 1, 1.0)])  # norms 1 and 2
    assert [(one.name, one.is_unit) for one in registry.all()] == [("half", True), ("one", False)]


def test_a_name_is_removed_at_one_layer_or_at_all_and_its_slots_wait_to_be_reclaimed() -> None:
    registry = DirectionRegistry(3, SIZE)
    registry.register([direction("a", 1), direction("a", 2), direction("b", 1)])
    (removed,) = registry.remove("a", 2)
    assert (removed.name, removed.layer, removed.slot) == ("a", 2, 1)
    assert set(registry.layers_of("a")) == {1}
    with pytest.raises(UnknownDirection, match=r"'a' belongs to layers \[1\], not 2"):
        registry.remove("a", 2)
    registry.remove("a")
    for layer in (None, 1):
        with pytest.raises(UnknownDirection, match="registered: b"):
            registry.remove("a", layer)
    with pytest.raises(BankFull):
        registry.register([direction("c", 1)])
    registry.reclaim()
    assert len(registry.register([direction("c", 1), direction("d", 1)])) == 2


def test_a_registry_goes_on_from_what_lies_in_the_bank_and_leaves_busy_slots_alone() -> None:
    before = DirectionRegistry(4, SIZE)
    before.register([direction("a", 1), direction("b", 1)])
    after = DirectionRegistry(4, SIZE, before.all(), busy={2})
    assert book(after) == book(before)
    ((slot, _),) = after.register([direction("c", 1)])
    assert slot == 3
    with pytest.raises(BankFull):
        after.register([direction("d", 1)])


def test_one_message_carries_all_vectors_and_their_slots_in_one_order() -> None:
    registry = DirectionRegistry(8, SIZE)
    registry.register([direction("a", 0)])
    writes = registry.register([direction(f"d{value}", 1, float(value)) for value in range(1, 6)])
    ((slots, vectors),) = bank_writes(writes)
    assert slots == [1, 2, 3, 4, 5]
    assert np.frombuffer(vectors, "<f4").reshape(5, SIZE).tolist() == [[float(value)] * SIZE for value in range(1, 6)]
    assert list(bank_writes([])) == []


def test_no_message_is_larger_than_allowed_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MOST_BYTES_A_MESSAGE", 2 * 4 * SIZE + 3)
    writes = DirectionRegistry(8, SIZE).register([direction(f"d{value}", 1, float(value)) for value in range(1, 6)])
    messages = list(bank_writes(writes))
    assert [len(vectors) // (4 * SIZE) for _, vectors in messages] == [2, 2, 1]
    rows = np.concatenate([np.frombuffer(vectors, "<f4").reshape(-1, SIZE) for _, vectors in messages])
    assert rows[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [slot for slots, _ in messages for slot in slots] == [slot for slot, _ in writes]


def test_a_full_bank_says_how_many_slots_are_needed_and_what_they_take() -> None:
    registry = DirectionRegistry(1000, 4096)
    registry.register([Direction(f"a{n}", 1, np.ones(4096, np.float32)) for n in range(4)])
    more = [Direction(f"b{n}", 1, np.ones(4096, np.float32)) for n in range(1000)]
    # 1,004 slots of 4,096 numbers of 4 bytes are 15.69 MiB.
    with pytest.raises(BankFull, match=r"max_directions=1004\) or more: a bank of 16 MiB on each worker \(1,004 slots"):
        registry.register(more)


def test_of_ten_thousand_names_a_refusal_lists_twenty() -> None:
    registry = DirectionRegistry(10_000, 1)
    registry.register([direction(f"d{n:04}", 0, size=1) for n in range(10_000)])
    with pytest.raises(UnknownDirection, match=r"d0019 and 9,980 others\. Perhaps you mean") as caught:
        registry.find("d12345", None, range(99))
    assert len(str(caught.value)) < 500


def test_the_memory_of_a_registration_is_told_in_parts() -> None:
    said = registration_memory(10_000, 4096, 16_384)
    # 10,000 vectors of 4,096 numbers of 4 bytes are 156.25 MiB, a bank of 16,384 is 256 MiB.
    for part in (
        "the vectors take 156 MiB of this process",
        "up to 312 MiB more",
        "256 MiB on each worker (16,384 slots",
    ):
        assert part in said


def test_more_configured_directions_than_slots_are_refused_before_a_vector_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        save_directions(tmp_path / "folder" / f"{name}.safetensors", [direction(name, 0), direction(name, 1)])
    save_directions(tmp_path / "c.safetensors", [direction("c", 0), direction("b", 1, 2.0)])  # b@1 is there twice
    files = (str(tmp_path / "folder"), str(tmp_path / "c.safetensors"))
    monkeypatch.setattr("vllm_steer.directions.files.load_directions", None)  # reads vectors
    assert check_room(SteerSettings(layers=(0,), directions=files, max_directions=5), SIZE) == 5
    with pytest.raises(
        BankFull, match=r"hold 5 directions, and max_directions is 4; allowed: at most so many\. Set max_"
    ):
        check_room(SteerSettings(layers=(0,), directions=files, max_directions=4), SIZE)
