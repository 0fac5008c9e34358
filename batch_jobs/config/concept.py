"""The concept of a study: what its directions are named for, and how a completion is told to show it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from batch_jobs.files.documents import read_json

STUDY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of studies and concepts: they become names of files and directions."""
QUESTION: Final = "What do you do?"
"""The paper's last line of a steering prompt."""
EMPATHY: Final = "empathy"
"""The paper's concept, which has everything built in."""
EMPATHY_KEYWORDS: Final = (
    "help",
    "support",
    "concern",
    "care",
    "worry",
    "feel",
    "understand",
    "sorry",
    "comfort",
    "listen",
    "reach out",
)
"""The paper's positive words, as its scorer has them."""
TASK_KEYWORDS: Final = (
    "objective",
    "task",
    "goal",
    "win",
    "complete",
    "achieve",
    "strategy",
    "efficient",
    "optimal",
    "proceed",
)
"""Its negative words."""
OWN_CONCEPT = "give a section (docs/guides/own-concept.md)"

Match = Literal["substring", "word_start", "word"]
"""Where a keyword may be found: anywhere (the paper's rule), at the start of a word, or as a whole word."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Poles(_Section):
    """Two words for the ends of the concept, as the report prints them."""

    positive: str = Field(min_length=1)
    """What a completion is that shows the concept, e.g. `formal`."""
    negative: str = Field(min_length=1)
    """What it is at the other end, e.g. `informal`."""


class Keywords(_Section):
    """Words by which a completion is scored; it is positive when it holds more distinct positive than negative ones."""

    positive: tuple[str, ...] = Field(min_length=1)
    negative: tuple[str, ...] = Field(min_length=1)
    match: Match = "substring"

    @field_validator("positive", "negative")
    @classmethod
    def _are_words(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        lowered = [word.lower() for word in words]
        if blank := [word for word in words if not word.strip() or word != word.strip()]:
            raise ValueError(f"{blank} are empty or have spaces around them; give words or phrases")
        if repeated := sorted({word for word in lowered if lowered.count(word) > 1}):
            raise ValueError(f"{repeated} given more than once (case does not count); give each word once")
        return words

    @model_validator(mode="after")
    def _sides_differ(self) -> Self:
        if both := sorted({word.lower() for word in self.positive} & {word.lower() for word in self.negative}):
            raise ValueError(f"{both} are on both sides, where they cancel; give each word to one side")
        return self


class Concept(_Section):
    """What a study looks for. `empathy` is built in; any other concept is described by these fields."""

    name: str = Field(pattern=STUDY_NAME)
    """Name of the directions; each layer has one of that name."""
    poles: Poles
    """Words of the report; without them the name, and `not` and the name."""
    outcome: Literal["keywords", "judge"] = "keywords"
    """What decides whether a completion is positive: its `keywords`, or the judge's grade 2."""
    keywords: Keywords | None = None
    question: str | None = QUESTION
    """Last line of a prompt made of `objective` and `pressure`; null: none."""
    ablation_words: dict[str, dict[str, tuple[str, ...]]] | None = None
    """Words that the lexical ablation replaces: keyword -> inflected form -> possible replacements. In a config the
    path of a JSON file with this content."""
    judge: str | None = None
    """The judge's question in your own words; null: the built-in one."""
    focus_scenario: str | None = None
    """Scenario of the report's single-scenario figures and examples; null: the paper's if the run has it, else one of
    the run's."""
    published: bool = False
    """Whether the report shows the paper's values beside the run's own."""

    @model_validator(mode="before")
    @classmethod
    def _described(cls, given: Any) -> Any:
        """A name alone is that of the built-in concept; a section of that name is laid over it."""
        if isinstance(given, str):
            if given != EMPATHY:
                raise ValueError(
                    f"got {given!r}, a name alone; allowed: {EMPATHY}, whose words and question are built in; for "
                    f"another concept {OWN_CONCEPT}, since its completions would else be scored by empathy words"
                )
            return _EMPATHY
        if not isinstance(given, Mapping):
            return given
        name = given.get("name")
        if name == EMPATHY:
            keywords = given.get("keywords")
            merged = {**_EMPATHY["keywords"], **keywords} if isinstance(keywords, Mapping) else _EMPATHY["keywords"]
            return {**_EMPATHY, **given, "keywords": merged}
        return {"poles": {"positive": str(name), "negative": f"not {name}"}, **given}

    @field_validator("ablation_words", mode="before")
    @classmethod
    def _read_from_the_file(cls, given: Any) -> Any:
        if not isinstance(given, str | Path):
            return given
        return read_json(Path(given), advice="give a JSON file of the words that the ablation replaces")

    @field_validator("ablation_words")
    @classmethod
    def _have_replacements(
        cls, words: dict[str, dict[str, tuple[str, ...]]] | None
    ) -> dict[str, dict[str, tuple[str, ...]]] | None:
        forms = [(form, others) for each in (words or {}).values() for form, others in each.items()]
        if words is not None and not forms:
            raise ValueError("got no words; give keyword -> form -> list of replacements")
        for form, others in forms:
            if form != " ".join(form.lower().split()) or not form:
                raise ValueError(f"the form {form!r} is not in lower case with single spaces; write it so")
            if not others or not all(other.strip() for other in others):
                raise ValueError(f"the form {form!r} has no replacement, or an empty one; give at least one word")
        return words

    @model_validator(mode="after")
    def _outcome_has_its_words(self) -> Self:
        if self.outcome == "keywords" and self.keywords is None:
            raise ValueError(
                f"outcome keywords without keywords for {self.name!r}; give keywords: {{positive: [...], negative: "
                "[...]}, or set outcome: judge"
            )
        return self

    @model_serializer(mode="wrap")
    def _short_where_built_in(self, serialise: Any) -> Any:
        """The built-in concept is its name: configs and run directories from before sections stay what they are."""
        described: dict[str, Any] = serialise(self)
        if self == empathy():
            return self.name
        # fields at their defaults are left out, so that a later version's new field changes no config's hash
        defaults = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        if self.name == EMPATHY:
            return described
        return {name: value for name, value in described.items() if name not in defaults or value != defaults[name]}

    @property
    def judge_frame(self) -> str | None:
        """The study's own text of the judge's question; None: the built-in one."""
        return self.judge

    @property
    def has_ablation_words(self) -> bool:
        """Whether the lexical ablation has words to replace: own ones, or the bundled ones of empathy."""
        return self.ablation_words is not None or self.name == EMPATHY


_EMPATHY: dict[str, Any] = {
    "name": EMPATHY,
    "poles": {"positive": "empathetic", "negative": "task-focused"},
    "keywords": {"positive": EMPATHY_KEYWORDS, "negative": TASK_KEYWORDS},
    "published": True,
}


def empathy() -> Concept:
    """The paper's concept: its word lists, its question, the bundled ablation words, its published values."""
    return Concept.model_construct(
        name=EMPATHY,
        poles=Poles(**_EMPATHY["poles"]),
        keywords=Keywords(**_EMPATHY["keywords"]),
        published=True,
    )


def concept_of_run(provenance: Mapping[str, Any]) -> Concept:
    """The concept that a run directory's provenance records; `empathy` where it records none.

    A run of an earlier version may have another name without a description. Its completions were scored by empathy
    words, which say nothing about that concept; it gets the judge as its outcome instead.
    """
    config = provenance.get("config")
    recorded = config.get("concept", EMPATHY) if isinstance(config, Mapping) else EMPATHY
    if isinstance(recorded, str) and recorded != EMPATHY:
        recorded = {"name": recorded, "outcome": "judge"}
    return Concept.model_validate(recorded)
