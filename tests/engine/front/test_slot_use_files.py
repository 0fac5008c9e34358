"""Every process of a server sees the uses of slots; a use ends with the process that counted it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from vllm_steer.engine.front.slot_use_files import SlotUse

CAPACITY = 16

# Counts slot 3 as used, prints that, and waits until it is killed.
OTHER_PROCESS = """
import sys
from pathlib import Path
from vllm_steer.engine.front.slot_use_files import SlotUse
use = SlotUse(Path(sys.argv[1]), 16)
use.add([3])
print("counted", flush=True)
sys.stdin.read()
"""


def other_process(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"counted\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_slot_is_busy_until_each_of_its_uses_is_taken_back(tmp_path: Path) -> None:
    use = SlotUse(tmp_path, CAPACITY)
    use.add([1, 2])
    use.add([2])
    assert use.busy() == {1, 2}
    use.subtract([1, 2])
    assert use.busy() == {2}
    use.subtract([2])
    assert use.busy() == set()
    use.close()


def test_another_process_sees_the_uses_and_a_killed_one_has_none(tmp_path: Path) -> None:
    use = SlotUse(tmp_path, CAPACITY)
    process = other_process(tmp_path)
    try:
        use.add([5])
        assert use.busy() == {3, 5}
        assert len(use.others()) == 1
    finally:
        end(process)
    assert use.busy() == {5}
    assert use.others() == []
    assert list(tmp_path.iterdir()) == [use.path], "the dead process's file is left"
    use.close()


def test_what_has_been_closed_is_gone(tmp_path: Path) -> None:
    first, second = SlotUse(tmp_path, CAPACITY), SlotUse(tmp_path, CAPACITY)
    first.add([7])
    assert second.busy() == {7}
    first.close()
    assert second.busy() == set()
    assert SlotUse.living(tmp_path) == [second.path]
    second.close()
    assert SlotUse.living(tmp_path) == []
