"""The bank slots that running requests use: one file per front-end process, which the others can read."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_SUFFIX = ".slots"


class SlotUse:
    """One process's use count of each slot.

    The file is locked as long as its process lives, and the kernel unlocks it however the process ends. So a file that
    can be locked belongs to a dead process.

    Args:
        folder: existing folder with the files of all processes of a server.
        capacity: number of bank slots.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder = folder
        self._lock = threading.Lock()  # admission may run in vLLM's renderer threads too
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f"{os.getpid()}-")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 4 * capacity)
        self._descriptor = descriptor
        self._counts_S = np.memmap(name, np.uint32, "r+", shape=(capacity,))
        self.path = Path(name).with_suffix(_SUFFIX)
        os.rename(name, self.path)  # others see it only now, locked and complete

    def add(self, slots: Iterable[int]) -> None:
        """Count one more use of each slot."""
        with self._lock:
            for slot in slots:
                self._counts_S[slot] += 1

    def subtract(self, slots: Iterable[int]) -> None:
        """Count one use fewer of each slot."""
        with self._lock:
            for slot in slots:
                self._counts_S[slot] -= 1

    @staticmethod
    def living(folder: Path) -> list[Path]:
        """Files of living processes; removes the files of dead ones."""
        found = []
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            if _is_locked(path):
                found.append(path)
            else:
                path.unlink(missing_ok=True)
        return found

    def others(self) -> list[Path]:
        """Files of the other living processes."""
        return [path for path in self.living(self.folder) if path != self.path]

    def busy(self) -> set[int]:
        """Slots that requests of any living process use."""
        used_S = self._counts_S > 0
        for path in self.others():
            used_S = used_S | (np.fromfile(path, np.uint32, used_S.size) > 0)
        return {int(slot) for slot in np.flatnonzero(used_S)}

    def close(self) -> None:
        """Drop all uses and remove the file. Nothing can be counted afterwards."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # its process has just closed it
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
