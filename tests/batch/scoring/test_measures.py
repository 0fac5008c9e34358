"""A row's measures depend on its text alone, not on the rows that are measured with it."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from batch_jobs.scoring.degeneration import degeneration
from batch_jobs.scoring.measures import measure_table
from batch_jobs.scoring.paper_metric import EMPATHY_KEYWORDS, TASK_KEYWORDS, has_context, is_coherent, is_empathetic

MARKERS: dict[str, list[str]] = {"plain": ["door", "Game"], "spanning": ["the door", "a game", "out"], "none": []}
WORDS = (
    *EMPATHY_KEYWORDS,
    *TASK_KEYWORDS,
    *(
        "as an AI",
        "cannot assist",
        "Door",
        "game",
        "the",
        "a",
        "out",
        "go",
        "{x}",
        "f(x)",
        "=",
        "==",
        "İ",
        "’tis",
        "naïve\u3000so",
        "HELPFUL",
    ),
)


def random_text(draw: random.Random) -> str:
    vocabulary = draw.sample(WORDS, k=draw.choice([1, 3, 12, len(WORDS)]))
    words = draw.choices(vocabulary, k=draw.choice([0, 1, 5, 9, 30, 90]))
    if draw.random() < 0.2:  # begins well, ends in a loop
        words += ["go", "out"] * 25
    return "".join(word + draw.choice([" ", " ", "\n", " \t"]) for word in words)


@pytest.mark.parametrize("seed", range(2))
def test_many_rows_measure_as_each_text_on_its_own(seed: int) -> None:
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(1500):  # more than one batch
        failed = draw.random() < 0.1
        rows.append(
            {
                "model": "m",
                "layer": 1,
                "scenario": draw.choice([*MARKERS, "unknown"]),
                "direction": "d",
                "op": "add",
                "span": "all",
                "alpha": 0.0,
                "alpha_residual_norm": 0.0,
                "completion_tokens": 1,
                "projection_generated": 0.0,
                "error": "no answer" if failed else None,
                "row_id": str(index),
                "completion": None if failed and draw.random() < 0.5 else random_text(draw),
            }
        )
    names = ("empathetic", "coherent", "in_context", *degeneration("")._fields)
    expected: list[dict[str, Any]] = []
    for row in rows:
        text, markers = row["completion"], MARKERS.get(row["scenario"])
        if row["error"]:
            expected.append(dict.fromkeys(names))
            continue
        expected.append(
            {
                "empathetic": is_empathetic(text),
                "coherent": is_coherent(text),
                "in_context": has_context(text, markers) if markers else None,
                **degeneration(text)._asdict(),
            }
        )
    measured = measure_table(pa.Table.from_pylist(rows), MARKERS)
    assert measured.select(names).to_pylist() == expected
    assert measured["failed"].to_pylist() == [row["error"] is not None for row in rows]
    for name in names:  # the texts differ in every measure
        assert len({row[name] for row in expected} - {None}) > 1, name
