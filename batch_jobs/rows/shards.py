"""How a grid is cut into shards: the rows that one engine runs as one batch and stores as one part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from batch_jobs.rows.grid import Row
from batch_jobs.rows.store import rows_digest


@dataclass(frozen=True)
class Shard:
    """Rows that are generated as one mixed batch."""

    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        """Stands for exactly these rows; the same in every session."""
        return rows_digest(row.row_id for row in self.rows)

    def halves(self) -> tuple[Shard, Shard]:
        """The two halves of a shard of more than one row."""
        middle = len(self.rows) // 2
        return Shard(self.rows[:middle]), Shard(self.rows[middle:])


def make_shards(rows: Sequence[Row], done: Collection[str], *, rows_per_part: int, workers: int) -> list[Shard]:
    """Cut the grid into shards of `rows_per_part` rows, fewer where that would leave a worker without any, and leave
    out what is done.

    The cuts depend on the whole grid and not on what is done, so that a shard cut short in one session is the same
    shard in the next. Neighbours in the grid stay together: samples of a condition share their prompt's KV blocks.
    """
    size = max(1, min(rows_per_part, -(-len(rows) // workers)))
    blocks = (rows[start : start + size] for start in range(0, len(rows), size))
    pending = (tuple(row for row in block if row.row_id not in done) for block in blocks)
    return [Shard(missing) for missing in pending if missing]
