"""Compare the completions of two runs as text, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from batch_jobs.config.study import AlphaUnit
from batch_jobs.rows.store import read_rows

_COLUMNS = ["row_id", "alpha", "alpha_residual_norm", "alpha_separation", "seed", "thought", "completion", "error"]
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class EqualShare:
    """How far the rows of two runs agree as text: the thought, if any, then the answer, if any."""

    rows: int
    """Rows compared, at least 1."""
    equal: int
    """Rows with identical completions, character for character."""
    mean_common_prefix: float
    """Mean number of equal leading characters. After the first difference, sampling continues from different texts."""
    mean_common_share: float
    """Mean of that number over the length of the longer completion, in 0..1; two empty completions count as 1."""

    @property
    def share(self) -> float:
        """`equal` over `rows`."""
        return self.equal / self.rows


@dataclass(frozen=True)
class CompletionAgreement:
    """Agreement of the completions of two runs, over the rows that both have."""

    rows_a: int
    rows_b: int
    shared: int
    """Rows with the same id: same model name, condition and sample number."""
    failed: int
    """Shared rows that have an error in at least one run; not compared."""
    other_seed: int
    """Shared sampled rows with different seeds; not compared. 0 for greedy rows."""
    decoding: Literal["greedy", "sampled"]
    """`greedy` when both runs decode at temperature 0. In float32 on one machine, greedy rows should be the same except
    at near ties. Sampled rows diverge where batches of other shapes change the last bits of a probability."""
    overall: EqualShare | None
    """None when there is nothing to compare."""
    by_alpha: dict[float, EqualShare]
    """α -> agreement of its rows; ascending, in the α unit of run A's config."""


def compare_completions(
    generations_a: Path, generations_b: Path, *, greedy: bool, alpha_unit: AlphaUnit
) -> CompletionAgreement:
    """Match the rows of two runs by id and compare their completions.

    Args:
        generations_a: the `generations` folder of run A.
        generations_b: that of run B.
        greedy: whether both runs decoded at temperature 0.
        alpha_unit: unit of the keys of `by_alpha`.

    Raises:
        StudyError: a part is unreadable.
    """
    rows_a, rows_b = (read_rows(folder).select(_COLUMNS) for folder in (generations_a, generations_b))
    shared = rows_a.join(rows_b, "row_id", join_type="inner", right_suffix="_b")
    failed = other_seed = 0
    everything = _Tally()
    tallies: dict[float, _Tally] = {}
    alpha_column = "alpha" if alpha_unit == "raw" else f"alpha_{alpha_unit}"
    for row in _in_batches(shared):
        if row["error"] is not None or row["error_b"] is not None:
            failed += 1
        elif not greedy and row["seed"] != row["seed_b"]:
            other_seed += 1
        else:
            for tally in (everything, tallies.setdefault(row[alpha_column], _Tally())):
                tally.add(_generated(row, ""), _generated(row, "_b"))
    return CompletionAgreement(
        rows_a=rows_a.num_rows,
        rows_b=rows_b.num_rows,
        shared=shared.num_rows,
        failed=failed,
        other_seed=other_seed,
        decoding="greedy" if greedy else "sampled",
        overall=everything.result() if everything.rows else None,
        by_alpha={alpha: tallies[alpha].result() for alpha in sorted(tallies)},
    )


def _generated(row: dict[str, Any], suffix: str) -> str:
    """The row's whole generated text: its thought, if any, then its answer, if any."""
    return (row[f"thought{suffix}"] or "") + (row[f"completion{suffix}"] or "")


def _in_batches(table: pa.Table) -> Iterator[dict[str, Any]]:
    # in batches: all completions of two large runs as Python strings would take gigabytes
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        yield from batch.to_pylist()


@dataclass
class _Tally:
    rows: int = 0
    equal: int = 0
    prefix: int = 0
    share: float = 0.0

    def add(self, first: str, second: str) -> None:
        longer = max(len(first), len(second))
        prefix = next(
            (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
            min(len(first), len(second)),
        )
        self.rows += 1
        self.equal += first == second
        self.prefix += prefix
        self.share += prefix / longer if longer else 1.0

    def result(self) -> EqualShare:
        return EqualShare(self.rows, self.equal, self.prefix / self.rows, self.share / self.rows)
