"""Neutral texts and multiple-choice questions, bundled or one's own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from batch_jobs.errors import StudyError
from batch_jobs.files.documents import read_json

Text = Annotated[str, Field(min_length=1)]


class Choice(BaseModel):
    """A question with several continuations of which one is right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Text
    options: Annotated[tuple[Text, ...], Field(min_length=2)]
    """Continuations as they follow `start`, white space included."""
    right: Annotated[int, Field(ge=0)]
    """Index of the right option."""

    @model_validator(mode="after")
    def _right_is_an_option(self) -> Self:
        if self.right >= len(self.options):
            raise ValueError(f"right is {self.right}; allowed: 0 to {len(self.options) - 1}")
        return self


@dataclass(frozen=True)
class CostMaterials:
    """What the steered model reads and answers."""

    texts: tuple[str, ...]
    """Neutral texts, for the perplexity; at least one."""
    choices: tuple[Choice, ...]
    """At least one."""

    @property
    def content_hash(self) -> str:
        """First 16 hex digits of the sha256 over texts and questions."""
        content = [self.texts, [choice.model_dump() for choice in self.choices]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_materials(texts: Path | None = None, choices: Path | None = None) -> CostMaterials:
    """Read the materials; None stands for the bundled ones.

    Args:
        texts: JSON list of strings.
        choices: JSON list of objects with `start`, `options` and `right`.

    Raises:
        StudyError: a file is absent or of another form; the message names it.
    """
    data = resources.files("batch_jobs") / "data"
    text_place, choice_place = texts or data / "neutral_texts.json", choices or data / "choices.json"
    documents = [read_json(place, advice="give a JSON file with a list") for place in (text_place, choice_place)]
    try:
        place = text_place
        read_texts = _TEXTS.validate_python(documents[0])
        place = choice_place
        return CostMaterials(read_texts, _CHOICES.validate_python(documents[1]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise StudyError(
            f"{place}: {where}: {first['msg']}; give a list of texts, or of questions with start, options and right."
        ) from None


_TEXTS = TypeAdapter(Annotated[tuple[Text, ...], Field(min_length=1)])
_CHOICES = TypeAdapter(Annotated[tuple[Choice, ...], Field(min_length=1)])
