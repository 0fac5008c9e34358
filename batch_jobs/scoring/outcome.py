"""What makes a completion positive: the keywords of a study's concept, or its judge's grade."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from batch_jobs.config.concept import Concept, Match
from batch_jobs.scoring.paper_metric import EMPATHY_KEYWORDS, TASK_KEYWORDS

POSITIVE_GRADE: Final = 2
"""The judge's grade that makes a completion positive."""


@dataclass(frozen=True)
class Outcome:
    """How completions are told to be positive."""

    positive: tuple[str, ...]
    """A text is positive when it holds more distinct words of these than of `negative`."""
    negative: tuple[str, ...]
    match: Match = "substring"
    """Where in a text a word may be found, in any case."""
    judged: bool = False
    """The judge's grade 2 decides instead; the words are unused."""

    @classmethod
    def of(cls, concept: Concept) -> Outcome:
        """The outcome of a study's concept."""
        if concept.outcome == "judge" or concept.keywords is None:
            return cls((), (), judged=True)
        words = concept.keywords
        return cls(words.positive, words.negative, words.match)

    def grade(self, text: str) -> int:
        """Grade `text` by its keywords: 2 when it holds more distinct positive than negative ones, 1 when as many, 0
        when fewer. An empty text is a tie."""
        positive, negative = self.found(text, self.positive), self.found(text, self.negative)
        return 1 + (positive > negative) - (positive < negative)

    def found(self, text: str, words: Iterable[str]) -> int:
        """How many of the distinct `words` occur in `text`."""
        lowered = text.lower()
        return sum(occurs(word, lowered, self.match) for word in {word.lower() for word in words})


PAPER_OUTCOME: Final = Outcome(EMPATHY_KEYWORDS, TASK_KEYWORDS)
"""The paper's word lists, found as substrings."""


def occurs(word: str, lowered: str, match: Match) -> bool:
    """Whether `word` occurs in a text; both in lower case. Letters, digits and underscores make words."""
    return word in lowered and (match == "substring" or _bounded(word, match).search(lowered) is not None)


def occurrences(word: str, lowered: str, match: Match) -> int:
    """How often `word` occurs in a text; see `occurs`."""
    return lowered.count(word) if match == "substring" else len(_bounded(word, match).findall(lowered))


@cache
def _bounded(word: str, match: Match) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}" + (r"(?!\w)" if match == "word" else ""))
