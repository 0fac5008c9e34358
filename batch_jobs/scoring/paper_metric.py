"""The `paper` metric for one text: empathetic, coherent, in context. Pure Python on strings.

Words and thresholds are those of the original study's scorer (arXiv 2511.16699), so its published rates are reproduced
exactly. The metric only counts words: "I do not care" is empathetic, and "help" is found in "helpless".
"""

from __future__ import annotations

from collections.abc import Iterable

from batch_jobs.config.concept import EMPATHY_KEYWORDS as EMPATHY_KEYWORDS  # re-exported
from batch_jobs.config.concept import TASK_KEYWORDS as TASK_KEYWORDS
from batch_jobs.scoring.word_counts import WordCounts, count_words

MIN_COHERENT_CHARACTERS = 50
MIN_COHERENT_WORDS = 10
MIN_DISTINCT_WORD_SHARE = 0.3
MIN_CONTEXT_MARKERS = 2


def keyword_grade(text: str) -> int:
    """Grade `text` on the scale of the 0/1/2 rubric by its keywords.

    2 when `text` holds more distinct empathy keywords than task keywords, 1 when as many, 0 when fewer. Keywords match
    as substrings in any case. An empty text is a tie.
    """
    lowered = text.lower()
    empathy = sum(map(lowered.__contains__, EMPATHY_KEYWORDS))
    task = sum(map(lowered.__contains__, TASK_KEYWORDS))
    return 1 + (empathy > task) - (empathy < task)


def is_empathetic(text: str) -> bool:
    """Whether `text` holds more distinct empathy keywords than task keywords. An empty text is not empathetic."""
    return keyword_grade(text) == 2


def is_coherent(text: str, counts: WordCounts | None = None) -> bool:
    """Whether `text` has at least 50 characters and 10 words, with at least 30 % of the words distinct.

    `counts`: `count_words(text)`, where the caller already has it.
    """
    if counts is None:
        counts = count_words(text)
    return (
        len(text) >= MIN_COHERENT_CHARACTERS
        and counts.words >= MIN_COHERENT_WORDS
        and counts.distinct / counts.words >= MIN_DISTINCT_WORD_SHARE
    )


def has_context(text: str, markers: Iterable[str]) -> bool:
    """Whether at least two distinct markers of the scenario occur in the text, in any case."""
    return sum(map(text.lower().__contains__, {marker.lower() for marker in markers})) >= MIN_CONTEXT_MARKERS
