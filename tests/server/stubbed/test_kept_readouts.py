"""Readouts kept by the id of their reply: bounds, age, keys."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_steer.engine.log import logger
from vllm_steer.errors import ReadoutNotFound
from vllm_steer.server.readouts.kept_readouts import KeptReadouts

THIRD = [{"index": 0, "readout": {"mean": "x" * (350 << 10)}}]  # of one MiB; three of them are too much


def ids(kept: KeptReadouts, names: str) -> str:
    """Those of the ids, one character each, under which something is kept."""

    def has(name: str) -> bool:
        try:
            return bool(kept.load(name, None))
        except ReadoutNotFound:
            return False

    return "".join(filter(has, names))


def test_the_oldest_leave_when_the_bound_is_reached(tmp_path: Path) -> None:
    kept = KeptReadouts(tmp_path, 1, 60.0)
    for name in "abc":
        kept.keep(name, None, THIRD)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1 << 20
    assert ids(kept, "abc") == "bc"
    kept.keep("b", None, THIRD)  # again: now the youngest
    kept.keep("d", None, THIRD)
    assert ids(kept, "abcd") == "bd"


def test_what_is_larger_than_the_bound_is_not_kept_and_makes_no_room(tmp_path: Path) -> None:
    kept = KeptReadouts(tmp_path, 1, 60.0)
    kept.keep("a", None, THIRD)
    kept.keep("b", None, THIRD * 4)
    assert ids(kept, "ab") == "a"


def test_the_bound_is_that_of_all_processes_together(tmp_path: Path) -> None:
    first, second = (KeptReadouts(tmp_path, 2, 60.0, processes=2) for _ in range(2))
    for name in "abc":
        first.keep(name, None, THIRD)
    second.keep("d", None, THIRD)
    assert ids(first, "abcd") == ids(second, "abcd") == "bcd"


def test_what_is_too_old_is_not_given_and_leaves(tmp_path: Path) -> None:
    kept = KeptReadouts(tmp_path, 1, 0.05)
    kept.keep("a", None, THIRD)
    (file,) = tmp_path.iterdir()
    os.utime(file, (time.time() - 1, time.time() - 1))
    assert ids(kept, "a") == ""
    time.sleep(0.06)
    kept.keep("b", None, THIRD)
    assert not file.exists()


def test_threads_may_keep_one_id_at_once(tmp_path: Path) -> None:
    kept = KeptReadouts(tmp_path, 1, 60.0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: kept.keep("a", None, [{"index": number, "readout": {}}]), range(400)))
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == kept.load("a", None)
    assert kept._bytes == file.stat().st_size


def test_a_disk_that_refuses_costs_no_reply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptReadouts(tmp_path / "gone", 1, 60.0)
    logger.addHandler(caplog.handler)
    kept.keep("a", None, THIRD)
    logger.removeHandler(caplog.handler)
    assert "The readouts of the reply a are not kept" in caplog.text
    assert ids(kept, "a") == ""


def test_an_id_can_hold_anything(tmp_path: Path) -> None:
    kept = KeptReadouts(tmp_path / "inner", 1, 60.0)
    (tmp_path / "inner").mkdir()
    kept.keep("../../x\0y", "key", THIRD)
    assert b"xxx" in kept.load("../../x\0y", "key")
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
