"""Cuts a grid into shards: the rows that one engine runs as one batch and stores as one part."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_jobs.rows.grid import Row
from batch_jobs.rows.row_ids import RowIds, keys_of
from batch_jobs.rows.store import rows_digest

_CHECKED_ROWS = 8192
"""Rows whose ids are compared with those of the finished rows at a time."""


class Grid(Protocol):
    """The rows of a grid in their order, which need not all be in memory."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """All rows."""
        ...

    def part(self, first: int, stop: int) -> Iterator[Row]:
        """The rows from number `first` to the one before `stop`."""
        ...


@dataclass(frozen=True)
class Shard:
    """Rows that one engine generates as one mixed batch."""

    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        """Digest of exactly these rows; the same in every session."""
        return rows_digest(row.row_id for row in self.rows)

    def halves(self) -> tuple[Shard, Shard]:
        """Split a shard of at least two rows into its two halves."""
        middle = len(self.rows) // 2
        return Shard(self.rows[:middle]), Shard(self.rows[middle:])


@dataclass(frozen=True)
class Cut:
    """The place of a shard in its grid. It takes a bit a row, so that many can be kept and sent."""

    first: int
    """Number of the first row of the cut."""
    length: int
    """Rows between the first and the last, finished ones included."""
    missing: str
    """A bit for each of them, in hex digits: whether it is in the shard."""

    def shard(self, grid: Grid) -> Shard:
        """The shard itself."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.missing), dtype=np.uint8), count=self.length)
        rows = grid.part(self.first, self.first + self.length)
        return Shard(tuple(row for row, wanted in zip(rows, bits, strict=True) if wanted))


class Shards(Collection[Shard]):
    """The shards that are left of a grid. Each is made when it is its turn."""

    def __init__(self, grid: Grid, missing: npt.NDArray[np.bool_], size: int) -> None:
        """`missing`: for each row of the grid, whether it is left; `size`: rows in a cut."""
        self._grid = grid
        self._missing = missing
        self._size = size

    @property
    def num_rows(self) -> int:
        """Rows of all shards together."""
        return int(np.count_nonzero(self._missing))

    @property
    def num_done(self) -> int:
        """Rows of the grid that are in no shard."""
        return len(self._missing) - self.num_rows

    @property
    def cuts(self) -> Iterator[Cut]:
        """The place of each shard."""
        for first in range(0, len(self._missing), self._size):
            block = self._missing[first : first + self._size]
            if block.any():
                yield Cut(first, len(block), np.packbits(block).tobytes().hex())

    def __len__(self) -> int:
        return sum(1 for _ in self.cuts)

    def __iter__(self) -> Iterator[Shard]:
        return (cut.shard(self._grid) for cut in self.cuts)

    def __contains__(self, shard: object) -> bool:
        return any(shard == one for one in self)


def make_shards(grid: Grid, done: RowIds, *, rows_per_part: int, workers: int) -> Shards:
    """Cut the grid into shards of `rows_per_part` rows and leave out the rows in `done`.

    Shards are smaller where a worker would otherwise get none. The cuts depend on the whole grid and not on `done`, so
    an interrupted shard is the same shard in the next session. Neighbours in the grid stay together: samples of a
    condition share their prompt's KV blocks.

    Args:
        grid: the whole grid.
        done: ids of the rows to leave out.
        rows_per_part: most rows in a shard.
        workers: number of engines that share the shards.
    """
    missing = np.ones(len(grid), dtype=np.bool_)
    if len(done):
        rows = iter(grid)
        for first in range(0, len(grid), _CHECKED_ROWS):
            ids = pa.array([row.row_id for row in islice(rows, _CHECKED_ROWS)], pa.string())
            missing[first : first + _CHECKED_ROWS] = ~done.holds(keys_of(ids))
    return Shards(grid, missing, max(1, min(rows_per_part, -(-len(grid) // workers))))
