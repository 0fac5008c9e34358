"""One registry for several processes: they agree, restarts keep it, and a slot that a request uses is never rewritten.

Several ``SharedRegistry`` objects on one folder stand for several processes here: the locks of their files are
their own even within one process. Where the process itself matters, there is a real one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.server.registry_stand_ins import (
    CAPACITY,
    SERVER,
    SIZE,
    StandInWorkers,
    admission_on,
    anything,
    direction,
)
from vllm_steer.directions import Direction, save_directions
from vllm_steer.engine.front import slots_in_flight
from vllm_steer.engine.registry import DirectionBook
from vllm_steer.errors import BadDirectionFile, BankFull, SettingsError, SteerError, UnknownDirection, WrongDimension
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.server.registry.registry_folder import RegistryDirectory, Server
from vllm_steer.server.registry.shared_registry import SharedRegistry

NEXT_SERVER = Server(pid=2, started=2.0)


opened: list[SharedRegistry] = []


@pytest.fixture(autouse=True)
def all_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skip the drain's pause, and at the end of a test close every process that looks alive."""
    monkeypatch.setattr(slots_in_flight, "DRAIN_SECONDS", 0.0)
    yield
    while opened:
        registry = opened.pop()
        if registry.use.path.exists():  # not closed by the test itself
            registry.close()


def joined(
    folder: Path, workers: StandInWorkers, server: Server = SERVER, configured: tuple[Direction, ...] = ()
) -> SharedRegistry:
    """A process of ``server`` that has joined the registry in ``folder``."""
    registry = SharedRegistry(RegistryDirectory(folder), server, CAPACITY, SIZE, workers.write)
    opened.append(registry)
    asyncio.run(registry.start(configured))
    return registry


def put(registry: SharedRegistry, *directions: Direction) -> None:
    asyncio.run(registry.put(directions, anything))


def remove(registry: SharedRegistry, name: str) -> None:
    asyncio.run(registry.remove(name, None, anything))


def book(registry: SharedRegistry) -> dict[tuple[str, int], str]:
    return {(one.name, one.layer): one.content_hash for one in registry.all()}


def content(*directions: Direction) -> dict[tuple[str, int], str]:
    return {(one.name, one.layer): one.content_hash for one in directions}


def test_what_one_process_registers_the_others_find_written(tmp_path: Path) -> None:
    workers = StandInWorkers()
    first, second = joined(tmp_path, workers), joined(tmp_path, workers)
    put(first, direction("a", 2.0))
    assert book(second) == content(direction("a", 2.0))
    assert workers.bank[second.find("a", None, range(99)).slot] == 2.0
    put(second, direction("a", 3.0), direction("b", 4.0))
    assert book(first) == content(direction("a", 3.0), direction("b", 4.0))
    remove(first, "a")
    assert book(second) == content(direction("b", 4.0))
    with pytest.raises(UnknownDirection):
        second.find("a", None, range(99))


def test_the_book_is_the_same_object_until_something_changes(tmp_path: Path) -> None:
    registry = joined(tmp_path, StandInWorkers())
    put(registry, direction("a", 1.0))
    before = registry.current()
    assert registry.current() is before
    put(registry, direction("a", 1.0))
    assert registry.current() is before, "the same content changed something"
    put(registry, direction("a", 2.0))
    assert registry.current() is not before


def test_nothing_is_found_before_the_workers_have_it(tmp_path: Path) -> None:
    class Watching(StandInWorkers):
        async def write(self, writes: list[tuple[int, Direction]]) -> None:
            assert book(watcher) == {}
            await super().write(writes)

    workers = Watching()
    watcher = joined(tmp_path, workers)
    put(joined(tmp_path, workers), direction("a", 1.0))
    assert book(watcher) == content(direction("a", 1.0))


def test_what_the_workers_refuse_is_not_registered_and_takes_no_slot(tmp_path: Path) -> None:
    class Failing(StandInWorkers):
        async def write(self, writes: list[tuple[int, Direction]]) -> None:
            raise RuntimeError("the engine is dead")

    registry = joined(tmp_path, Failing())
    for _ in range(CAPACITY + 1):
        with pytest.raises(RuntimeError, match="dead"):
            put(registry, direction("a", 1.0))
    assert book(registry) == {}
    assert registry.show_bank() == (0, 0, CAPACITY)


@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        ([direction("b", 1.0), direction("c", 1.0, size=SIZE + 1)], WrongDimension),
        ([direction(f"b{index}", 1.0) for index in range(CAPACITY)], BankFull),
    ],
)
def test_a_refused_change_changes_nothing(tmp_path: Path, wrong: list[Direction], refusal: type[SteerError]) -> None:
    workers = StandInWorkers()
    registry = joined(tmp_path, workers)
    put(registry, direction("a", 1.0))
    bank, before = dict(workers.bank), registry.current()
    with pytest.raises(refusal):
        put(registry, *wrong)
    assert workers.bank == bank
    assert registry.current() is before


def test_a_check_sees_both_books_and_can_prevent_the_change(tmp_path: Path) -> None:
    registry = joined(tmp_path, StandInWorkers())
    put(registry, direction("a", 1.0))

    def check(before: DirectionBook, after: DirectionBook) -> None:
        assert before.find("a", None, range(99)).content_hash == direction("a", 1.0).content_hash
        assert after.find("a", None, range(99)).content_hash == direction("a", 2.0).content_hash
        raise BankFull("prevented")

    with pytest.raises(BankFull, match="prevented"):
        asyncio.run(registry.put([direction("a", 2.0)], check))
    assert book(registry) == content(direction("a", 1.0))


def test_changes_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    workers = StandInWorkers()
    registries = [joined(tmp_path, workers) for _ in range(CAPACITY)]

    async def all_at_once() -> None:
        await asyncio.gather(
            *(one.put([direction(f"d{index}", index + 1.0)], anything) for index, one in enumerate(registries))
        )

    asyncio.run(all_at_once())
    assert len(book(registries[0])) == CAPACITY
    assert sorted(workers.bank.values()) == [1.0, 2.0, 3.0, 4.0]


def test_a_restart_keeps_what_clients_registered_and_writes_it_to_the_new_workers(tmp_path: Path) -> None:
    configured = (direction("file", 1.0), direction("changed", 1.0))
    first = joined(tmp_path, StandInWorkers(), configured=configured)
    put(first, direction("kept", 2.0), direction("changed", 3.0))
    remove(first, "file")
    put(first, direction("gone", 4.0))
    remove(first, "gone")
    first.close()
    workers = StandInWorkers()
    # The operator has configured one more file for the new server.
    more = (direction("new", 5.0), *configured)
    again = joined(tmp_path, workers, NEXT_SERVER, more)
    assert book(again) == content(*more, direction("kept", 2.0), direction("changed", 3.0))
    assert {name: workers.bank[again.find(name, None, range(99)).slot] for name in ("kept", "changed")} == {
        "kept": 2.0,
        "changed": 3.0,
    }
    # The workers write the configured files themselves, in this order, from slot 0.
    assert [again.find(name, None, range(99)).slot for name in ("new", "file")] == [0, 1]


def test_vectors_come_back_as_they_were_sent_and_replaced_ones_leave_no_file(tmp_path: Path) -> None:
    registry = joined(tmp_path, StandInWorkers(), configured=(direction("file", 9.0),))
    sent = Direction("a/b:c", 3, np.array([0.1, -2.0, 3e-8, 4e20], np.float32))
    put(registry, direction("a/b:c", 1.0, layer=3))
    put(registry, sent)
    assert registry.load_vectors([registry.find("a/b:c", 3, range(99))])[0].vector.tobytes() == sent.vector.tobytes()
    assert registry.load_vectors([registry.find("file", 1, range(99))])[0].vector[0] == 9.0
    assert len(list((tmp_path / "vectors").iterdir())) == 2


def test_a_file_of_several_vectors_stays_as_long_as_one_of_them_is_registered(tmp_path: Path) -> None:
    registry = joined(tmp_path, StandInWorkers())
    put(registry, direction("a", 1.0), direction("b", 2.0), direction("c", 3.0))
    (file,) = (tmp_path / "vectors").iterdir()
    put(registry, direction("a", 4.0))
    remove(registry, "b")
    assert file.exists()
    assert len(list((tmp_path / "vectors").iterdir())) == 2
    found = [registry.find(name, None, range(99)) for name in ("c", "a")]
    assert [one.vector[0] for one in registry.load_vectors(found)] == [3.0, 4.0]
    remove(registry, "c")
    assert not file.exists()


def test_a_vector_that_is_not_the_registered_one_is_refused(tmp_path: Path) -> None:
    registry = joined(tmp_path, StandInWorkers())
    put(registry, direction("a", 1.0))
    (file,) = (tmp_path / "vectors").iterdir()
    save_directions(file, [direction("a", 2.0)])
    with pytest.raises(BadDirectionFile, match="another vector for 'a@1' than the index says"):
        registry.load_vectors([registry.find("a", None, range(99))])
    file.unlink()
    with pytest.raises(BadDirectionFile, match="not a readable safetensors file"):
        registry.load_vectors([registry.find("a", None, range(99))])


def test_a_folder_of_a_server_that_wrote_a_file_for_each_direction_is_taken_over(tmp_path: Path) -> None:
    entries = []
    (tmp_path / "vectors").mkdir()
    for slot, (name, value) in enumerate({"a": 1.0, "b": 2.0}.items()):
        one = direction(name, value)
        save_directions(tmp_path / "vectors" / f"{name}.safetensors", [one])
        entries.append(
            {"name": name, "layer": 1, "slot": slot, "content_hash": one.content_hash, "norm": one.norm, "peak": value}
            | {"uploaded": True, "file": f"{name}.safetensors"}
        )
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "server": "1-1.0", "directions": entries}, indent=1))
    workers = StandInWorkers()
    registry = joined(tmp_path, workers, NEXT_SERVER)
    assert book(registry) == content(direction("a", 1.0), direction("b", 2.0))
    assert sorted(workers.bank.values()) == [1.0, 2.0]


def test_many_directions_are_read_again_at_a_restart(tmp_path: Path) -> None:
    many = [Direction(f"d{n}", 1, np.full(SIZE, n + 1.0, np.float32)) for n in range(2000)]
    first = SharedRegistry(RegistryDirectory(tmp_path), SERVER, 4000, SIZE, StandInWorkers().write)
    opened.append(first)
    asyncio.run(first.start(()))
    put(first, *many[:1000])
    for one in many[1000:1010]:
        put(first, one)
    first.close()
    workers = StandInWorkers()
    again = SharedRegistry(RegistryDirectory(tmp_path), NEXT_SERVER, 4000, SIZE, workers.write)
    opened.append(again)
    asyncio.run(again.start(many[1010:]))
    assert book(again) == content(*many)
    assert set(workers.bank.values()) == {n + 1.0 for n in range(1010)}
    assert len(list((tmp_path / "vectors").iterdir())) == 12  # a file a change, and one for the configured ones


def test_a_folder_in_use_by_a_living_server_is_refused(tmp_path: Path) -> None:
    first = joined(tmp_path, StandInWorkers())
    with pytest.raises(SettingsError, match="in use by another server"):
        joined(tmp_path, StandInWorkers(), NEXT_SERVER)
    first.close()
    joined(tmp_path, StandInWorkers(), NEXT_SERVER)


def test_a_folder_of_another_model_is_refused_with_its_path(tmp_path: Path) -> None:
    first = joined(tmp_path, StandInWorkers())
    put(first, direction("a", 1.0))
    first.close()
    other_model = SharedRegistry(RegistryDirectory(tmp_path), NEXT_SERVER, CAPACITY, SIZE + 1, StandInWorkers().write)
    opened.append(other_model)
    with pytest.raises(WrongDimension, match=f"registry_dir {tmp_path}: direction 'a@1' has 4 elements"):
        asyncio.run(other_model.start(()))


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    joined(tmp_path, StandInWorkers()).close()
    (tmp_path / "index.json").write_text('{"server": 1}')
    with pytest.raises(SettingsError, match="is no index of directions"):
        joined(tmp_path, StandInWorkers(), NEXT_SERVER)


def test_a_private_folder_goes_with_its_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = RegistryDirectory.private(Server(pid=2**22 + 1, started=5.0))  # beyond the largest pid of Linux
    alive = Server.of(processes=1)
    directory = RegistryDirectory.private(alive)
    assert not dead.path.exists(), "what a dead server left is still there"
    assert RegistryDirectory.private(alive).path == directory.path, "two processes of a server have two folders"
    assert RegistryDirectory.private(Server.of(processes=2)).path != directory.path
    registry = SharedRegistry(directory, alive, CAPACITY, SIZE, StandInWorkers().write)
    directory.remove_if_unused()
    assert directory.path.exists(), "removed under a living process"
    registry.close()
    directory.remove_if_unused()
    assert not directory.path.exists()


# A process that registers one direction and is killed.
OTHER_PROCESS = """
import asyncio, os, signal, sys
from pathlib import Path
import numpy as np
from vllm_steer.directions import Direction
from vllm_steer.server.registry.registry_folder import RegistryDirectory, Server
from vllm_steer.server.registry.shared_registry import SharedRegistry
async def write(writes):
    pass
async def main():
    registry = SharedRegistry(RegistryDirectory(Path(sys.argv[1])), Server(1, 1.0), 4, 4, write)
    await registry.start(())
    await registry.put([Direction("a", 1, np.full(4, 2.0))], lambda before, after: None)
    registry.use.add([3])
    if sys.argv[2] == "locked":
        async with registry.directory.locked():
            os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["locked", pytest.param("unlocked", marks=pytest.mark.breadth)])
def test_a_killed_process_leaves_what_it_registered_and_neither_lock_nor_uses(tmp_path: Path, when: str) -> None:
    registry = joined(tmp_path, StandInWorkers())
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(tmp_path), when], check=False, timeout=60)
    assert done.returncode == -9
    assert book(registry) == content(direction("a", 2.0))
    put(registry, *(direction(name, 3.0) for name in ("b", "c", "d")))  # every slot, slot 3 among them
    assert registry.show_bank() == (CAPACITY, 0, 0)


def test_a_slot_that_is_rewritten_while_a_request_looks_it_up_is_not_used(tmp_path: Path) -> None:
    """The race that admission guards against: a slot is looked up, then rewritten, and only then counted as used."""
    workers = StandInWorkers()
    here, there = joined(tmp_path, workers), joined(tmp_path, workers)
    put(here, direction("a", 1.0))
    admission = admission_on(here)
    assert admission.in_flight is not None
    looked_up = here.find("a", None, range(99)).slot
    acquire = admission.in_flight.acquire

    def late(request_id: str, slots: Any) -> None:
        if tuple(slots) == (looked_up,):
            changes = threading.Thread(  # with its own event loop, since admission is not a coroutine
                target=lambda: [put(there, direction("a", value)) for value in (2.0, 3.0, 4.0)]
            )
            changes.start()
            changes.join()
            assert workers.bank[looked_up] != 1.0, "the slot was not rewritten, so this tests nothing"
        acquire(request_id, slots)

    admission.in_flight.acquire = late  # type: ignore[method-assign]
    resolved = admission.admit("id", RequestSpec((Steering("a", 1.0),)), 5)
    ((_, slot, *_),) = resolved.windows[0].entries
    assert slot != looked_up
    assert workers.bank[slot] == 4.0
    assert here.use.busy() == {slot}, "the uses of the slots that were not taken are still counted"


def test_slots_of_projections_and_traces_are_in_use_too(tmp_path: Path) -> None:
    registry = joined(tmp_path, StandInWorkers())
    put(registry, direction("a", 1.0), direction("b", 2.0), direction("c", 3.0))
    spec = RequestSpec((Steering("a", 1.0),), Readout([1], project=["b"], trace=["c"]))
    admission_on(registry).admit("id", spec, 5)
    assert registry.use.busy() == {registry.find(name, None, range(99)).slot for name in "abc"}
