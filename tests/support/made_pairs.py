"""Contrastive pairs of made-up words, and what a file of readouts says about their texts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from batch_jobs.directions.readout_file import ReadText, TextSet
from batch_jobs.texts.contrastive import Pair, Split

COMMON = tuple(f"word{number}" for number in range(40))
TELLING = {"positive": ("plea", "friend", "tears"), "negative": ("route", "points", "margin")}
"""Words that no lexical ablation replaces, so that an ablated text is the text itself."""


def made_split(
    train: int,
    test: int,
    *,
    scenarios: Sequence[str] = ("harbour", "market", "station"),
    writers: Sequence[str | None] = (None,),
    telling: float = 0.5,
    seed: int = 0,
) -> Split:
    """Pairs that go through scenarios and writers in turn. `telling`: chance that a text holds a word of its side."""
    draw = random.Random(seed)

    def text(side: str) -> str:
        words = draw.choices(COMMON, k=draw.randint(15, 25))
        return " ".join([*words, draw.choice(TELLING[side])] if draw.random() < telling else words)

    pairs = [
        Pair(
            f"pair-{number}",
            scenarios[number % len(scenarios)],
            text("positive"),
            text("negative"),
            writers[number // len(scenarios) % len(writers)],
        )
        for number in range(train + test)
    ]
    return Split(tuple(pairs[:train]), tuple(pairs[train:]))


def read_texts(
    split: Split, *, num_tokens: int = 100, replacements: Sequence[int] | None = None
) -> dict[TextSet, tuple[ReadText, ...]]:
    """The texts of a split as read; with `replacements`, the positive test texts once more, as texts with that many
    words replaced."""

    def read(pair: Pair, text: str, replaced: int = 0) -> ReadText:
        return ReadText(pair.pair_id, hashlib.sha256(text.encode()).hexdigest(), num_tokens, replaced)

    texts: dict[TextSet, tuple[ReadText, ...]] = {
        "train_positive": tuple(read(pair, pair.positive) for pair in split.train),
        "train_negative": tuple(read(pair, pair.negative) for pair in split.train),
        "test_positive": tuple(read(pair, pair.positive) for pair in split.test),
        "test_negative": tuple(read(pair, pair.negative) for pair in split.test),
    }
    if replacements is not None:
        texts["test_positive_ablated"] = tuple(
            read(pair, pair.positive, count) for pair, count in zip(split.test, replacements, strict=True)
        )
    return texts
