"""How a grid is cut into shards, and that the cuts stay while rows are finished."""

from __future__ import annotations

from batch_jobs.rows.grid import Condition, Row
from batch_jobs.rows.shards import Shard, make_shards


def rows(count: int) -> list[Row]:
    cell = Condition("m", 1, "kind", 1.0, 0.1, "raw", "the_duel", "add", "all")
    return [Row(f"{index:016x}", cell, index, 0) for index in range(count)]


def ids(shards: list[Shard]) -> list[list[str]]:
    return [[row.row_id for row in shard.rows] for shard in shards]


def test_every_row_is_in_one_shard_and_every_worker_has_one() -> None:
    grid = rows(105)
    for workers, rows_per_part, sizes in ((1, 1024, [105]), (2, 1024, [53, 52]), (4, 10, [10] * 10 + [5])):
        shards = make_shards(grid, (), rows_per_part=rows_per_part, workers=workers)
        assert [len(shard.rows) for shard in shards] == sizes
        assert [row for shard in shards for row in shard.rows] == grid


def test_a_shard_that_was_not_finished_is_the_same_shard_in_the_next_session() -> None:
    grid = rows(40)
    first = make_shards(grid, (), rows_per_part=10, workers=2)
    stored = {row.row_id for row in first[1].rows}
    again = make_shards(grid, stored, rows_per_part=10, workers=2)
    assert [shard.key for shard in again] == [first[index].key for index in (0, 2, 3)]


def test_rows_done_are_left_out_of_the_shard_they_were_in() -> None:
    grid = rows(6)
    shards = make_shards(grid, {grid[0].row_id, grid[4].row_id}, rows_per_part=3, workers=1)
    assert ids(shards) == [[row.row_id for row in grid[1:3]], [grid[3].row_id, grid[5].row_id]]


def test_a_key_stands_for_the_set_of_rows_not_their_order() -> None:
    grid = tuple(rows(3))
    assert Shard(grid).key == Shard(grid[::-1]).key != Shard(grid[:2]).key


def test_halves_lose_no_row() -> None:
    for count in (2, 3, 7):
        first, second = Shard(tuple(rows(count))).halves()
        assert first.rows + second.rows == tuple(rows(count))
        assert first.rows
        assert second.rows
