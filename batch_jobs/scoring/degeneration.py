"""Detect how a completion fails as text: empty, short, stuck in a loop, turned into code, a refusal. Pure Python and
zlib.

These signs flag obvious failures. They do not judge quality.
"""

from __future__ import annotations

import re
import zlib
from typing import Final, NamedTuple

from batch_jobs.scoring.word_counts import WordCounts, count_words

LOOP_REPETITION: Final = 0.5
"""A text is a loop from this repetition share on, over the whole text or over its last 4-grams."""
SOFT_LOOP_REPETITION: Final = 0.35
"""From this repetition share on, a text that is no loop yet comes back to the same phrases too often to be read. Prose
of 200 words stays below 0.1."""
LOOP_TAIL_GRAMS: Final = 40
"""Number of last 4-grams checked on their own, for a text that begins well."""
LOOP_COMPRESSION_RATIO: Final = 0.2
"""A text that zlib compresses below this ratio is a loop, even where words cannot show it ("hahaha...", no spaces).
English of 900 characters has a ratio of 0.45 to 0.7."""
MIN_COMPRESSIBLE_BYTES: Final = 100
"""For shorter texts the compression ratio is not used: zlib's own overhead dominates it."""
MIN_GRAM_WORDS: Final = 8
"""With fewer words the share of repeated 4-grams is not used; such a text is a loop when all its words are equal."""
MIN_LOOP_WORDS: Final = 3
"""A text of fewer words is never a loop by its words."""
WORDS_PER_CODE_SIGN: Final = 10
"""A text with a sign of code for every ten words or fewer is code-like. Prose that names an action has one sign in a
hundred words."""

SHORT_WORDS: Final = 10
"""A text of fewer words is short; it is then also too short to count as coherent."""
REFUSAL_CHARACTERS: Final = 200
"""A refusal is looked for in this many characters from the beginning, where chat models put it."""

# What chat models say when they decline. Each verb is one that a helper does not use of itself: "I can't help but feel"
# and "I can't imagine" are no refusals.
_VERBS = (
    "assist",
    "comply",
    "engage in",
    "fulfil",
    "help with",
    "help you with",
    "participate",
    "provide",
    "continue with",
    "discuss",
)
_SELF = "as an ai"
_REFUSAL = re.compile(
    r"\b(?:can(?:no|['’])t|can not|won['’]t|will not|(?:am|['’]m) (?:un|not )able to)"
    rf" (?:{'|'.join(_VERBS)})|\b{_SELF}\b"
)
_IN_REFUSALS = (*_VERBS, _SELF)
"""Every refusal holds one of these; looking for them costs a third of the regex search."""

# Signs of code that prose does not contain. Fenced blocks are no sign: chat models put letters and maps into them. Each
# pattern comes with the characters that every match begins with; testing for them costs a tenth of the regex search.
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
    """Failure signatures of one text."""

    empty: bool
    """The text is nothing but white space."""
    loop: bool
    """The text repeats words, a phrase or characters."""
    code_like: bool
    """At least one sign of code (braces, equals signs, calls, `Output: 'open_door'`) for every ten words."""
    repetition: float
    """1 - distinct 4-grams / 4-grams over the words as written, in 0..1; 0.0 for fewer than four words."""
    compression_ratio: float | None
    """zlib level 1 bytes over UTF-8 bytes, > 0; None for an empty text. Short texts do not compress: below about 100
    bytes the ratio approaches and exceeds 1."""
    soft_loop: bool = False
    """35 % or more of the 4-grams repeat, over the whole text or over its last 4-grams, but the text is no `loop`."""
    refusal: bool = False
    """The text begins with words by which chat models decline ("I can't assist with that")."""
    short: bool = False
    """Fewer than ten words, but not empty."""


def degeneration(text: str, counts: WordCounts | None = None) -> Degeneration:
    """Detect the failure signatures of `text`. An empty text is neither a loop nor code-like.

    `counts`: `count_words(text)`, where the caller already has it.
    """
    if counts is None:
        counts = count_words(text)
    if not counts.words:
        return Degeneration(empty=True, loop=False, code_like=False, repetition=0.0, compression_ratio=None)
    raw = text.encode("utf-8", errors="replace")
    ratio = len(zlib.compress(raw, 1)) / len(raw)
    signs = sum([len(sign.findall(text)) for start, sign in _CODE_SIGNS if start in text])
    loop = _is_loop(text, counts) or (len(raw) >= MIN_COMPRESSIBLE_BYTES and ratio < LOOP_COMPRESSION_RATIO)
    return Degeneration(
        empty=False,
        loop=loop,
        code_like=signs > 0 and signs * WORDS_PER_CODE_SIGN >= counts.words,
        repetition=counts.repeated_grams / counts.grams if counts.grams else 0.0,
        compression_ratio=ratio,
        soft_loop=not loop and counts.words >= MIN_GRAM_WORDS and _repeats(text, counts, SOFT_LOOP_REPETITION),
        refusal=_is_refusal(text[:REFUSAL_CHARACTERS].lower()),
        short=counts.words < SHORT_WORDS,
    )


def _is_refusal(lowered: str) -> bool:
    return any(part in lowered for part in _IN_REFUSALS) and _REFUSAL.search(lowered) is not None


def _is_loop(text: str, counts: WordCounts) -> bool:
    if counts.words < MIN_GRAM_WORDS:
        return counts.words >= MIN_LOOP_WORDS and counts.distinct == 1
    return _repeats(text, counts, LOOP_REPETITION)


def _repeats(text: str, counts: WordCounts, share: float) -> bool:
    """Whether at least this share of the 4-grams repeats, over the whole text or over its tail."""
    if counts.repeated_grams >= share * counts.grams:
        return True
    # shortcut: most texts repeat less as a whole than a looping tail alone would
    if counts.grams <= LOOP_TAIL_GRAMS or counts.repeated_grams < share * LOOP_TAIL_GRAMS:
        return False
    tail = count_words(" ".join(text.split()[-LOOP_TAIL_GRAMS - 3 :]))
    return tail.repeated_grams >= share * LOOP_TAIL_GRAMS
