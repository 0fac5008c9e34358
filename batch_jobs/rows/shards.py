"""Cuts a grid into shards: the rows that one engine runs as one batch and stores as one part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from batch_jobs.rows.grid import Row
from batch_jobs.rows.store import rows_digest


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


def make_shards(rows: Sequence[Row], done: Collection[str], *, rows_per_part: int, workers: int) -> list[Shard]:
    """Cut the grid into shards of `rows_per_part` rows and leave out the rows in `done`.

    Shards are smaller where a worker would otherwise get none. The cuts depend on the whole grid and not on `done`, so
    an interrupted shard is the same shard in the next session. Neighbours in the grid stay together: samples of a
    condition share their prompt's KV blocks.

    Args:
        rows: the whole grid.
        done: ids of the rows to leave out.
        rows_per_part: most rows in a shard.
        workers: number of engines that share the shards.
    """
    size = max(1, min(rows_per_part, -(-len(rows) // workers)))
    blocks = (rows[start : start + size] for start in range(0, len(rows), size))
    pending = (tuple(row for row in block if row.row_id not in done) for block in blocks)
    return [Shard(missing) for missing in pending if missing]
