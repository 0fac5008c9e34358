"""How a grid is cut into shards, and that the cuts stay while rows are finished."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator

import pytest

from batch_jobs.config.study import Study
from batch_jobs.rows.grid import Condition, Row, StudyRows
from batch_jobs.rows.row_ids import RowIds
from batch_jobs.rows.shards import Shard, make_shards


class Rows(list[Row]):
    """A grid that is all in memory."""

    def part(self, first: int, stop: int) -> Iterator[Row]:
        return iter(self[first:stop])


def rows(count: int) -> Rows:
    cell = Condition("m", 1, "kind", 1.0, 0.1, "raw", "the_duel", "add", "all")
    return Rows(Row(f"{index:016x}", cell, index, 0) for index in range(count))


def study(samples: int) -> Study:
    return Study.model_validate(
        {
            "name": "small",
            "model": "owner/model",
            "extract": {"layers": [3, 5]},
            "steer": {
                "layers": [3, 5],
                "alphas": [-1, 0, 1, 2],
                "scenarios": ["the_duel", "the_listener"],
                "samples": samples,
                "controls": {"random": 1},
            },
        }
    )


def study_rows(samples: int) -> StudyRows:
    return StudyRows(study(samples), {3: 10.0, 5: 20.0})


def ids(shards: Iterable[Shard]) -> list[list[str]]:
    return [[row.row_id for row in shard.rows] for shard in shards]


def test_every_row_is_in_one_shard_and_every_worker_has_one() -> None:
    grid = rows(105)
    for workers, rows_per_part, sizes in ((1, 1024, [105]), (2, 1024, [53, 52]), (4, 10, [10] * 10 + [5])):
        shards = make_shards(grid, RowIds(), rows_per_part=rows_per_part, workers=workers)
        assert [len(shard.rows) for shard in shards] == sizes
        assert [row for shard in shards for row in shard.rows] == grid


def test_a_shard_that_was_not_finished_is_the_same_shard_in_the_next_session() -> None:
    grid = rows(40)
    first = list(make_shards(grid, RowIds(), rows_per_part=10, workers=2))
    stored = RowIds(row.row_id for row in first[1].rows)
    again = make_shards(grid, stored, rows_per_part=10, workers=2)
    assert [shard.key for shard in again] == [first[index].key for index in (0, 2, 3)]


def test_rows_done_are_left_out_of_the_shard_they_were_in() -> None:
    grid = rows(6)
    shards = make_shards(grid, RowIds({grid[0].row_id, grid[4].row_id}), rows_per_part=3, workers=1)
    assert (len(shards), shards.num_rows, shards.num_done) == (2, 4, 2)
    assert ids(shards) == [[row.row_id for row in grid[1:3]], [grid[3].row_id, grid[5].row_id]]


def test_a_shard_is_found_again_from_its_cut() -> None:
    grid = study_rows(samples=7)
    done = RowIds(row.row_id for number, row in enumerate(grid) if number % 3 == 0)
    shards = make_shards(grid, done, rows_per_part=10, workers=1)
    assert [cut.shard(grid) for cut in shards.cuts] == list(shards)
    assert {row.row_id for shard in shards for row in shard.rows} == {
        row.row_id for number, row in enumerate(grid) if number % 3
    }


def test_a_part_of_a_study_s_grid_is_that_part_of_all_its_rows() -> None:
    grid = study_rows(samples=3)
    everything = list(grid)
    assert len(grid) == len(everything) == 2 * 2 * (3 * 2 + 1) * 3
    for first in (0, 1, 20, 21, 40, 83):
        for stop in (first, first + 1, first + 30, 84, 200):
            assert list(grid.part(first, stop)) == everything[first:stop]


@pytest.mark.parametrize("finished", [0.0, 0.9])
def test_memory_hardly_grows_with_the_rows_of_a_grid(finished: float) -> None:
    """A byte a row is left of the grid and eight of each finished one, against 300 of a Row and its id."""

    def peak(samples: int) -> float:
        grid = study_rows(samples)
        done = RowIds(row.row_id for number, row in enumerate(grid) if number < finished * len(grid))
        tracemalloc.start()
        shards = make_shards(grid, done, rows_per_part=100, workers=1)
        assert sum(len(shard.rows) for shard in shards) == shards.num_rows > 0
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = study_rows(300), study_rows(600)
    assert len(few) > 8192  # more than are compared at a time
    a_row = (peak(600) - peak(300)) / (len(many) - len(few))
    assert a_row < 4


def test_a_key_stands_for_the_set_of_rows_not_their_order() -> None:
    grid = tuple(rows(3))
    assert Shard(grid).key == Shard(grid[::-1]).key != Shard(grid[:2]).key


def test_halves_lose_no_row() -> None:
    for count in (2, 3, 7):
        first, second = Shard(tuple(rows(count))).halves()
        assert first.rows + second.rows == tuple(rows(count))
        assert first.rows
        assert second.rows
