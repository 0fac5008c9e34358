"""Word statistics of a text: how many words it has, and how many of them repeat."""

from __future__ import annotations

from typing import NamedTuple


class WordCounts(NamedTuple):
    """Counts over the words of one text, split as by `str.split`."""

    words: int
    distinct: int
    """Distinct words, compared as written, with case and punctuation."""
    grams: int
    """4-grams: four words in a row."""
    repeated_grams: int
    """4-grams minus distinct 4-grams."""


def count_words(text: str) -> WordCounts:
    """Count the words of one text. `batch_jobs.scoring.word_index` counts many texts at two thirds of the cost."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return WordCounts(
        words=len(words), distinct=len(set(words)), grams=len(grams), repeated_grams=len(grams) - len(set(grams))
    )
