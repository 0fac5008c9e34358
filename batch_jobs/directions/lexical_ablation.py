"""Lexical ablation: replace a text's words about the concept by others, to test whether a probe only counts words."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from batch_jobs.config.concept import Concept
from batch_jobs.errors import StudyError
from batch_jobs.files.documents import read_json

Replacements = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Keyword -> inflected form in lower case -> possible replacements for that form."""

_SOUNDS_LIKE_VOWEL = re.compile("(?!use)[aeiou]")


@dataclass(frozen=True)
class AblatedText:
    """A text after the replacements."""

    text: str
    replacements: int
    """Words (or phrases, such as `reach out`) replaced."""


@cache
def load_replacements() -> Replacements:
    """Read the bundled list, `data/ablation_words.json`: 41 empathy keywords with their inflected forms.

    No replacement is a form of any keyword.
    """
    words = read_json(
        resources.files("batch_jobs") / "data" / "ablation_words.json", advice="install the package again"
    )
    return MappingProxyType(
        {
            keyword: {form: tuple(replacements) for form, replacements in forms.items()}
            for keyword, forms in words.items()
        }
    )


def replacements_of(concept: Concept) -> Replacements:
    """The concept's own words, or the bundled ones of empathy.

    Raises:
        StudyError: the concept has none.
    """
    if concept.ablation_words is not None:
        return concept.ablation_words
    if not concept.has_ablation_words:
        raise StudyError(
            f"The concept {concept.name!r} has no ablation_words; give concept.ablation_words in the study's config, "
            "or set validation.lexical_ablation: false."
        )
    return load_replacements()


def ablate_text(text: str, *, seed: int, text_id: str, words: Replacements | None = None) -> AblatedText:
    """Replace every word of `words` (None: the bundled list) in `text` by one of its replacements.

    Matches whole words in any case. The replacement keeps the case (lower case, Capital or CAPITALS), and an a/an
    before it is corrected. `seed` and `text_id` draw the replacements, so the result is reproducible and independent
    of other texts.
    """
    keywords = load_replacements() if words is None else words
    forms = {form: stand_ins for inflected in keywords.values() for form, stand_ins in inflected.items()}
    draw = random.Random(f"{seed}/{text_id}")

    def replaced(match: re.Match[str]) -> str:
        stand_in = draw.choice(forms[" ".join(match["form"].lower().split())])
        article = match["article"] or ""
        if article:
            right = "an" if _SOUNDS_LIKE_VOWEL.match(stand_in) else "a"
            article = _cased(right, article) + article[-1]
        return article + _cased(stand_in, match["form"])

    ablated, count = _pattern(frozenset(forms)).subn(replaced, text)
    return AblatedText(ablated, count)


@cache
def _pattern(forms: frozenset[str]) -> re.Pattern[str]:
    # longest first, so that a shorter form does not match the start of a phrase or a hyphenated word
    alternatives = "|".join(
        r"\s+".join(map(re.escape, form.split())) for form in sorted(forms, key=lambda form: (-len(form), form))
    )
    # a hyphen belongs to the word: "self-care" is no form of "care"
    return re.compile(rf"(?P<article>\ban?\s)?(?<![\w-])(?P<form>{alternatives})(?![\w-])", re.IGNORECASE)


def _cased(word: str, like: str) -> str:
    like = like.strip()
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word
