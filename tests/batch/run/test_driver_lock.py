from __future__ import annotations

import threading
import time

import pytest

from batch_jobs.config.study import StudyError
from batch_jobs.files.object_store import StorePath
from batch_jobs.run import driver_lock
from batch_jobs.run.driver_lock import DriverLock
from tests.support.s3_server import S3Server


@pytest.fixture
def run(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> StorePath:
    # S3 tells times to the second, so a renewal must be later than that
    monkeypatch.setattr(driver_lock, "BEAT_SECONDS", 1.1)
    monkeypatch.setattr(driver_lock, "LEFT_BEHIND_SECONDS", 3.5)
    monkeypatch.setattr(driver_lock, "LOOK_SECONDS", 0.2)
    return StorePath.parse(s3.address("runs/demo"))


def drivers(run: StorePath) -> list[str]:
    return sorted((run / "drivers").files())


def test_a_second_driver_is_refused_while_the_first_works_and_admitted_after_it(run: StorePath) -> None:
    with DriverLock(run) as first:
        with pytest.raises(StudyError, match=r"^s3://studies/runs/demo is in use by another driver \(process \d+ on"):
            DriverLock(run).__enter__()
        assert len(drivers(run)) == 1
        first.check()
    assert drivers(run) == []
    began = time.monotonic()
    with DriverLock(run):
        pass
    assert time.monotonic() - began < driver_lock.LEFT_BEHIND_SECONDS / 2


def test_what_a_killed_driver_has_left_is_removed_after_a_while(run: StorePath) -> None:
    (run / "drivers" / "killed.json").write_bytes(b"{}")
    began = time.monotonic()
    with DriverLock(run):
        assert time.monotonic() - began >= driver_lock.LEFT_BEHIND_SECONDS
        assert "killed.json" not in drivers(run)


def test_of_two_that_start_at_once_never_both_are_admitted(run: StorePath) -> None:
    admitted: list[int] = []
    start, end = threading.Barrier(2), threading.Event()

    def drive(number: int) -> None:
        start.wait()
        try:
            with DriverLock(run):
                admitted.append(number)
                end.wait(20)
        except StudyError:
            end.set()

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(admitted) <= 1
    assert drivers(run) == []


def test_a_driver_that_lost_its_place_finds_out_and_leaves_the_other_ones_object(run: StorePath) -> None:
    with DriverLock(run) as lock:
        (mine,) = drivers(run)
        (run / "drivers" / mine).unlink()
        (run / "drivers" / "other.json").write_bytes(b"{}")
        time.sleep(2 * driver_lock.BEAT_SECONDS)
        with pytest.raises(StudyError, match="another driver has taken this run directory"):
            lock.check()
    assert drivers(run) == ["other.json"]


def test_a_store_that_is_away_for_a_moment_costs_no_driver_its_place(run: StorePath, s3: S3Server) -> None:
    with DriverLock(run) as lock:
        s3.tell("stop")
        time.sleep(2)
        s3.tell("start")
        time.sleep(2)
        lock.check()
        assert len(drivers(run)) == 1
