"""Measure the texts row by row: the numbers that scoring needs, so that no table of all texts is held in memory.

Word counts and keyword searches run on a thousand texts at once. zlib takes two fifths of the remaining time. A large
folder is measured by one process per core; each process takes whole parts.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.rows.generation_parts import (
    COLUMN_TYPES,
    ScoreError,
    count_rows,
    in_thought,
    part_paths,
    read_part,
    split_table,
)
from batch_jobs.scoring.degeneration import Degeneration, degeneration
from batch_jobs.scoring.outcome import PAPER_OUTCOME, POSITIVE_GRADE, Outcome
from batch_jobs.scoring.paper_metric import MIN_CONTEXT_MARKERS, is_coherent
from batch_jobs.scoring.word_index import WordIndex

Markers = Mapping[str, Sequence[str]]
"""Scenario id -> its context markers."""

PARALLEL_ROWS = 20_000
"""Folders with fewer rows are measured in this process, since starting others would take longer."""
_PARTS_A_TASK = 8  # parts are often small; sent one by one, they would keep the processes waiting

_NO_ROWS = pa.schema(list(COLUMN_TYPES.items())).empty_table()
_SIGNS = dict.fromkeys(Degeneration._fields, pa.bool_()) | {
    "repetition": pa.float64(),
    "compression_ratio": pa.float64(),  # null for an empty text
}


def measure_table(table: pa.Table, markers: Markers, outcome: Outcome = PAPER_OUTCOME) -> pa.Table:
    """Measure each row of a table of generations. `outcome` decides which texts are `empathetic`; the column has this
    name whatever the concept.

    Returns:
        The columns of COLUMN_TYPES without the texts; `failed` (the row has an error); `in_thought` (it ended inside a
        thought); and, null for rows without an answer, `word_grade` (`Outcome.grade`), `empathetic`,
        `empathetic_word_start` (the same with keywords at word starts only), `coherent`, `in_context` and the fields of
        `Degeneration`. `in_context` is also null where the scenario has no markers, and `empathetic` in all rows where
        a judge decides. `empathetic_word_start` is null in all rows unless keywords are found as substrings.

    Raises:
        ScoreError: as for `scoring_columns`.
    """
    return _measure_all(split_table(table), markers, outcome)


def measure_generations(
    folder: Path, markers: Markers, processes: int | None = None, outcome: Outcome = PAPER_OUTCOME
) -> pa.Table:
    """Run `measure_table` on all parts under `folder`, in the order of their paths.

    The result takes about 200 bytes per row. `processes`: None means one per core from 20,000 rows on, else one.

    Raises:
        ScoreError: there are no rows, or as for `read_part`.
    """
    parts = part_paths(folder)
    rows = sum(map(count_rows, parts))
    if rows == 0:
        raise ScoreError(f"There are no generations under {folder}; generate samples before scoring.")
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if rows >= PARALLEL_ROWS else 1
    measure = partial(_measure_part, markers=markers, outcome=outcome)
    if processes == 1:
        return pa.concat_tables([measure(part) for part in parts])
    # spawned, not forked: the caller may hold an engine's threads and a device, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(parts)), mp_context=context) as pool:
        chunk = max(1, min(_PARTS_A_TASK, len(parts) // processes))
        return pa.concat_tables(pool.map(measure, parts, chunksize=chunk))


def no_measures(outcome: Outcome = PAPER_OUTCOME) -> pa.Table:
    """What `measure_table` gives of a table without rows."""
    return _measure(_NO_ROWS, {}, outcome)


def _measure_part(part: Path, markers: Markers, outcome: Outcome) -> pa.Table:
    return _measure_all(read_part(part), markers, outcome)


def _measure_all(tables: Iterable[pa.Table], markers: Markers, outcome: Outcome) -> pa.Table:
    measured = [_measure(table, markers, outcome) for table in tables]
    return pa.concat_tables(measured) if measured else no_measures(outcome)


def _measure(table: pa.Table, markers: Markers, outcome: Outcome) -> pa.Table:
    failed, unfinished = pc.is_valid(table["error"]), in_thought(table)
    unanswered = pc.or_(failed, unfinished)
    texts = pc.fill_null(table["completion"], "").combine_chunks()
    words = WordIndex(texts)
    signs, coherent = [], []
    for text, counts in zip(texts.to_pylist(), words.counts(), strict=True):
        signs.append(degeneration(text, counts))
        coherent.append(is_coherent(text, counts))
    grade = _word_grade(words, outcome)
    columns = {
        "word_grade": pa.array(grade, pa.int8()),
        "empathetic": pa.array(grade == POSITIVE_GRADE, mask=np.full(len(grade), outcome.judged)),
        "empathetic_word_start": _positive_at_word_starts(words, outcome),
        "coherent": pa.array(coherent, pa.bool_()),
        "in_context": _in_context(table["scenario"], words, markers),
        **{name: pa.array([getattr(sign, name) for sign in signs], kind) for name, kind in _SIGNS.items()},
    }
    for name, column in columns.items():
        table = table.append_column(name, pc.if_else(unanswered, None, column))
    table = table.drop_columns(["completion", "error", "thought"])
    return table.append_column("failed", failed).append_column("in_thought", unfinished)


def _word_grade(words: WordIndex, outcome: Outcome) -> npt.NDArray[np.int64]:
    """(N,) `Outcome.grade` of each text."""
    positive = words.count_found(outcome.positive, match=outcome.match)
    negative = words.count_found(outcome.negative, match=outcome.match)
    grade: npt.NDArray[np.int64] = 1 + np.sign(positive - negative)
    return grade


def _positive_at_word_starts(words: WordIndex, outcome: Outcome) -> pa.Array:
    """Which texts are positive with keywords at word starts only: how far a verdict rests on matches inside other
    words, such as "win" in "following". Null where keywords are not found as substrings or a judge decides."""
    if outcome.judged or outcome.match != "substring":
        return pa.nulls(len(words), pa.bool_())
    return pa.array(_word_grade(words, replace(outcome, match="word_start")) == POSITIVE_GRADE)


def _in_context(scenarios: pa.ChunkedArray, words: WordIndex, markers: Markers) -> pa.Array:
    """Null where the scenario has no markers."""
    names = np.array(scenarios.to_pylist(), dtype=object)
    known = np.zeros(len(names), dtype=np.bool_)
    found = np.zeros(len(names), dtype=np.int64)
    for scenario in filter(markers.get, set(names)):
        rows = names == scenario
        known |= rows
        found += words.count_found(markers[scenario], within=rows)
    return pa.array(found >= MIN_CONTEXT_MARKERS, mask=~known)
