"""What the measures of a text need to know of its words: how many there are, and how many of them repeat."""

from __future__ import annotations

from typing import NamedTuple


class WordCounts(NamedTuple):
    """Counts over the words of one text, as `str.split` gives them."""

    words: int
    distinct: int
    """Distinct words, compared as written, case and punctuation included."""
    grams: int
    """4-grams: four words in a row."""
    repeated_grams: int
    """4-grams less distinct 4-grams."""


def count_words(text: str) -> WordCounts:
    """The counts of one text; `batch_jobs.scoring.word_index` has those of many texts at two thirds of the cost."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return WordCounts(
        words=len(words), distinct=len(set(words)), grams=len(grams), repeated_grams=len(grams) - len(set(grams))
    )
