"""How a completion fails as text: empty, stuck in a loop, or turned into code. Pure Python and zlib on one string.

These are signs, not a judgement of quality: they say of a text at a glance what a reader would say first.
"""

from __future__ import annotations

import re
import zlib
from typing import Final, NamedTuple

from batch_jobs.scoring.word_counts import WordCounts, count_words

LOOP_REPETITION: Final = 0.5
"""A text is a loop from this repetition share on, be it of the whole text or of its last 4-grams."""
LOOP_TAIL_GRAMS: Final = 40
"""How many last 4-grams are asked on their own, for a text that begins well."""
LOOP_COMPRESSION_RATIO: Final = 0.2
"""A text that zlib makes smaller than this share is a loop even where words cannot show it ("hahaha...", no spaces).
English of 900 characters comes to 0.45 .. 0.7."""
MIN_COMPRESSIBLE_BYTES: Final = 100
"""Below this the compression ratio says more of zlib's own overhead than of the text, so it decides nothing."""
MIN_GRAM_WORDS: Final = 8
"""With fewer words the share of repeated 4-grams says nothing; such a text is a loop when all its words are one."""
MIN_LOOP_WORDS: Final = 3
WORDS_PER_CODE_SIGN: Final = 10
"""A text with a sign of code for every ten words or fewer is code-like. Prose that names an action has one in a
hundred."""

# What prose has no use for. Fenced blocks alone are no sign: chat models put letters and maps into them. Each pattern
# stands beside characters that every match begins with: finding out that a text lacks them costs a tenth of the search.
_CODE_SIGNS = tuple(
    (start, re.compile(pattern))
    for start, pattern in (
        ("{", r"\{"),
        ("}", r"\}"),
        ("=", r"=+"),
        (";\n", r";\n"),
        ("(", r"\((?<=\w\()(?!e?s\))[^\s()]*\)"),  # call(argument), but not option(s)
        (":", r""":\s*['"`‘“]\w+['"`’”]"""),  # Output: 'open_door'
    )
)


class Degeneration(NamedTuple):
    """What is wrong with one text."""

    empty: bool
    """Nothing but white space."""
    loop: bool
    """Repeats itself: words, a phrase, or characters."""
    code_like: bool
    """At least one sign of code (braces, equals signs, calls, `Output: 'open_door'`) for every ten words."""
    repetition: float
    """1 - distinct 4-grams / 4-grams over the words as written, in 0..1; 0.0 below four words."""
    compression_ratio: float | None
    """zlib level 1 bytes over UTF-8 bytes, > 0. Short texts do not compress: below about 100 bytes it nears and passes
    1. None for an empty text."""


def degeneration(text: str, counts: WordCounts | None = None) -> Degeneration:
    """The failure signatures of `text`; `counts` are those of `count_words(text)`, for a caller that has them. An empty
    text is neither a loop nor code."""
    if counts is None:
        counts = count_words(text)
    if not counts.words:
        return Degeneration(empty=True, loop=False, code_like=False, repetition=0.0, compression_ratio=None)
    raw = text.encode("utf-8", errors="replace")
    ratio = len(zlib.compress(raw, 1)) / len(raw)
    signs = sum([len(sign.findall(text)) for start, sign in _CODE_SIGNS if start in text])
    return Degeneration(
        empty=False,
        loop=_is_loop(text, counts) or (len(raw) >= MIN_COMPRESSIBLE_BYTES and ratio < LOOP_COMPRESSION_RATIO),
        code_like=signs > 0 and signs * WORDS_PER_CODE_SIGN >= counts.words,
        repetition=counts.repeated_grams / counts.grams if counts.grams else 0.0,
        compression_ratio=ratio,
    )


def _is_loop(text: str, counts: WordCounts) -> bool:
    if counts.words < MIN_GRAM_WORDS:
        return counts.words >= MIN_LOOP_WORDS and counts.distinct == 1
    if counts.repeated_grams >= LOOP_REPETITION * counts.grams:
        return True
    # most texts repeat less in all than the tail alone would have to
    if counts.grams <= LOOP_TAIL_GRAMS or counts.repeated_grams < LOOP_REPETITION * LOOP_TAIL_GRAMS:
        return False
    tail = count_words(" ".join(text.split()[-LOOP_TAIL_GRAMS - 3 :]))
    return tail.repeated_grams >= LOOP_REPETITION * LOOP_TAIL_GRAMS
