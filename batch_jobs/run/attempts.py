"""Counts how often work was begun and never ended. The counts are in files, since the counting process itself may die.

Without them, a row that kills its engine (a fault in a kernel, exhausted memory) would go to one worker after another
forever. A worker that ends with its whole machine is counted too, as nothing tells the two apart from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batch_jobs.files.atomic import write_atomically

if TYPE_CHECKING:
    from batch_jobs.files.object_store import StorePath


@dataclass(frozen=True)
class AttemptLog:
    """One small file for each piece of running or interrupted work; none for work that ended.

    Attributes:
        folder: holds the files; made when needed.
    """

    folder: Path | StorePath

    def begin(self, key: str) -> int:
        """Record that `key` begins; returns how often it began before without an `end`. `key` names a file."""
        earlier = self._read(key)
        write_atomically(self.folder / key, str(earlier + 1))
        return earlier

    def end(self, key: str) -> None:
        """Forget `key`: it ended, either well or with an error that was handled."""
        (self.folder / key).unlink(missing_ok=True)

    def _read(self, key: str) -> int:
        try:
            return int((self.folder / key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0
