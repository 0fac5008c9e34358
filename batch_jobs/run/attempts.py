"""How often work was begun and never ended, kept on disk because what has to be counted is the death of the process
that counts.

A row that kills its engine (a fault in a kernel, memory exhausted) would otherwise be handed to the next worker, and
the next, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batch_jobs.files.atomic import write_atomically


@dataclass(frozen=True)
class AttemptLog:
    """One small file a piece of work that is under way or was cut short; none for work that ended."""

    folder: Path

    def begin(self, key: str) -> int:
        """Note that `key` is begun; returns how often it was begun before without an `end`."""
        earlier = self._read(key)
        write_atomically(self.folder / key, str(earlier + 1))
        return earlier

    def end(self, key: str) -> None:
        """Forget `key`: it ended, well or with an error that was dealt with."""
        (self.folder / key).unlink(missing_ok=True)

    def _read(self, key: str) -> int:
        try:
            return int((self.folder / key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return 0
