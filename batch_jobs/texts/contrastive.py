"""Scenarios, and pairs of texts that differ only in the concept: directions are made from the pairs.

Sources: the bundled set, a file of pairs in the same form, or a folder with the paper's own train_pairs.jsonl
and test_pairs.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from batch_jobs.config.concept import QUESTION
from batch_jobs.config.study import SplitSizes, StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import Place, read_json, read_json_lines

SIDES = ("positive", "negative")
"""Fields of a pair's two texts in a file of pairs."""
PAPER_SIDES = ("empathic_text", "non_empathic_text")
"""The same fields in the paper's files."""
_SITUATION_FIELDS = ("objective", "pressure", "empathy_pressure", "prompt", "prompts")


@dataclass(frozen=True)
class Pair:
    """Two texts about one scenario that differ only in the concept."""

    pair_id: str
    scenario_id: str
    positive: str
    """The concept is present."""
    negative: str
    """The concept is absent, or its opposite is present."""
    source_model: str | None = None
    """Who wrote the pair; None where the file does not say."""


@dataclass(frozen=True)
class Scenario:
    """A situation that the model is prompted with: an objective and a pressure against it, or whole prompts."""

    id: str
    title: str
    objective: str
    """What the model is to do; empty where `prompts` are given."""
    pressure: str
    """What speaks against the objective, e.g. somebody's distress; empty where `prompts` are given."""
    markers: tuple[str, ...]
    """Lower-case words that show that a completion is about this scenario; empty if none are known."""
    rubric: tuple[str, str, str] | None = None
    """Criteria for grades 0, 1 and 2 (the concept absent, in part, in full); None if none are known."""
    prompts: tuple[str, ...] = ()
    """Whole prompts, used in turn by the samples; empty where objective and pressure make the prompt."""

    def situation(self, sample: int = 0) -> str:
        """What the scenario says, without the question: objective and pressure, or the prompt of this sample."""
        if self.prompts:
            return self.prompts[sample % len(self.prompts)]
        return f"{self.objective}\n\n{self.pressure}"

    @property
    def entry(self) -> dict[str, Any]:
        """The scenario as an object of a scenarios file. A run is bound to it, so the paper's field name stays."""
        texts: dict[str, Any] = {"objective": self.objective, "empathy_pressure": self.pressure}
        if self.prompts:
            texts = {"prompts": self.prompts}
        return {"id": self.id, "title": self.title, **texts, "markers": self.markers, "rubric": self.rubric}


@dataclass(frozen=True)
class Split:
    """Pairs from which the directions are made, and held-out pairs to validate them."""

    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @property
    def content_hash(self) -> str:
        """First 16 hex digits of the sha256 over both lists, texts and order included."""
        # the keys of earlier versions, so that their run directories are found again
        content = [
            [
                {
                    "pair_id": pair.pair_id,
                    "scenario_id": pair.scenario_id,
                    "empathic": pair.positive,
                    "non_empathic": pair.negative,
                }
                for pair in pairs
            ]
            for pairs in (self.train, self.test)
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def steering_prompts(scenario: Scenario, question: str | None = QUESTION) -> tuple[str, ...]:
    """The scenario's prompts; sample k uses number k modulo their count.

    One prompt of objective, pressure and `question` (None: no question), separated by blank lines, as in the paper; or
    the scenario's own prompts, unchanged.
    """
    if scenario.prompts:
        return scenario.prompts
    situation = scenario.situation()
    return (situation if question is None else f"{situation}\n\n{question}",)


def split_pairs(pairs: Sequence[Pair], *, train: int, seed: int) -> Split:
    """Split the pairs, stratified by scenario: each scenario gives the same share of its pairs to the train side.

    Deterministic: depends on the pairs' ids and the seed, not on their order, and one scenario's draw does
    not depend on another's pairs. Uneven shares are rounded by largest remainder, so exactly `train` pairs are on the
    train side.

    Raises:
        StudyError: not 0 < train < len(pairs).
    """
    if not 0 < train < len(pairs):
        raise StudyError(f"Cannot train on {train} of {len(pairs)} pairs; leave at least one pair on each side.")
    by_scenario: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.pair_id):
        by_scenario.setdefault(pair.scenario_id, []).append(pair)
    quotas = {scenario: divmod(train * len(members), len(pairs)) for scenario, members in by_scenario.items()}
    taken = {scenario: whole for scenario, (whole, _) in quotas.items()}
    largest_first = sorted(quotas, key=lambda scenario: (-quotas[scenario][1], scenario))
    for scenario in largest_first[: train - sum(taken.values())]:
        taken[scenario] += 1

    train_side: list[Pair] = []
    test_side: list[Pair] = []
    for scenario in sorted(by_scenario):
        members = by_scenario[scenario]
        random.Random(f"{seed}/{scenario}").shuffle(members)
        train_side += members[: taken[scenario]]
        test_side += members[taken[scenario] :]
    return Split(tuple(train_side), tuple(test_side))


def load_split(source: Path | None, sizes: SplitSizes) -> Split:
    """The pairs of a study, split.

    Args:
        source: None for the bundled pairs, a file of pairs, or a folder with train_pairs.jsonl and test_pairs.jsonl.
        sizes: how to split the pairs of one file, or the bundled ones; ignored for a folder.

    Raises:
        StudyError: a file is absent or malformed or holds text without a UTF-8 form, ids repeat, or `sizes` do not add
            up to the number of pairs.
    """
    if source is not None and source.is_dir():
        split = Split(
            tuple(_read_pairs(source / "train_pairs.jsonl", "train")),
            tuple(_read_pairs(source / "test_pairs.jsonl", "test")),
        )
        _refuse_repeated([pair.pair_id for pair in (*split.train, *split.test)], "pair_id", source)
        return split
    pairs = load_pairs(source)
    if sizes.train + sizes.test != len(pairs):
        raise StudyError(
            f"{_place_of_pairs(source)}: holds {len(pairs)} pairs, but the split asks for {sizes.train} + "
            f"{sizes.test}; make split.train and split.test add up to the number of pairs."
        )
    return split_pairs(pairs, train=sizes.train, seed=sizes.seed)


def load_pairs(source: Path | None) -> tuple[Pair, ...]:
    """The pairs of `source`, as for `load_split`, unsplit and in the order of their files.

    Raises:
        StudyError: a file is absent or malformed or holds text without a UTF-8 form, or ids repeat.
    """
    if source is not None and source.is_dir():
        split = load_split(source, SplitSizes())
        return (*split.train, *split.test)
    place = _place_of_pairs(source)
    pairs = tuple(_read_pairs(place, "pair"))
    _refuse_repeated([pair.pair_id for pair in pairs], "pair_id", place)
    return pairs


def load_scenarios(source: Path | None) -> dict[str, Scenario]:
    """Scenarios by id, from a JSON list of objects; None means the bundled ones.

    A scenario has `objective` and `pressure` (or the paper's `empathy_pressure`), or `prompt`, or a list of `prompts`.
    Other fields than those of Scenario are ignored (the paper's file has more). A scenario without `markers` or
    without a `rubric` takes that of the bundled scenario of the same id, or none. A rubric is a list of three texts,
    or an object with the keys "0", "1" and "2".

    Raises:
        StudyError: the file is absent or malformed, or holds text without a UTF-8 form.
    """
    bundled = _read_scenarios(_bundled("scenarios.json"), {})
    if source is None:
        return bundled
    return _read_scenarios(source, bundled)


def write_scenarios(path: Path, scenarios: Iterable[Scenario]) -> None:
    """Write scenarios as a file that `load_scenarios` reads, atomically."""
    entries = [{field: value for field, value in scenario.entry.items() if value is not None} for scenario in scenarios]
    write_atomically(path, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def _read_scenarios(place: Place, known: Mapping[str, Scenario]) -> dict[str, Scenario]:
    entries = read_json(place, advice="give a JSON file with a list of scenarios")
    if not isinstance(entries, list) or not entries:
        raise StudyError(f"{place}: got {type(entries).__name__}; it must hold a non-empty list of scenarios.")
    scenarios = []
    for number, entry in enumerate(entries, start=1):
        where = f"{place}: scenario {number}"
        name, title = (_text(entry, field, where) for field in ("id", "title"))
        objective, pressure, prompts = _situation(entry, where)
        namesake = known.get(name)
        markers = entry.get("markers", namesake.markers if namesake else ())
        if not isinstance(markers, list | tuple) or not all(isinstance(marker, str) for marker in markers):
            raise StudyError(f"{where}: markers must be a list of strings; got {markers!r}.")
        lowered = tuple(marker.lower() for marker in markers)
        rubric = _rubric(entry["rubric"], where) if "rubric" in entry else namesake.rubric if namesake else None
        scenarios.append(Scenario(name, title, objective, pressure, lowered, rubric, prompts))
    _refuse_repeated([scenario.id for scenario in scenarios], "id", place)
    return {scenario.id: scenario for scenario in scenarios}


def _situation(entry: Mapping[str, Any], where: str) -> tuple[str, str, tuple[str, ...]]:
    """Objective, pressure and prompts; either the first two or the last are empty."""
    given = [field for field in _SITUATION_FIELDS if field in entry]
    match given:
        case ["prompt"]:
            return "", "", (_text(entry, "prompt", where),)
        case ["prompts"]:
            prompts = entry["prompts"]
            if (
                not isinstance(prompts, list)
                or not prompts
                or not all(isinstance(p, str) and p.strip() for p in prompts)
            ):
                raise StudyError(f"{where}: prompts must be a non-empty list of texts; got {prompts!r}.")
            return "", "", tuple(prompts)
        case ["objective", "empathy_pressure"] | ["empathy_pressure"]:
            return _text(entry, "objective", where), _text(entry, "empathy_pressure", where), ()
        case ["objective", "pressure"] | ["objective"] | ["pressure"]:
            return _text(entry, "objective", where), _text(entry, "pressure", where), ()
    raise StudyError(
        f"{where}: got {' and '.join(given) or 'none of the fields of a situation'}; allowed: objective and pressure, "
        "or prompt, or prompts."
    )


def _rubric(given: Any, where: str) -> tuple[str, str, str]:
    texts = [given.get(grade) for grade in ("0", "1", "2")] if isinstance(given, dict) else given
    match texts:
        case [str(none), str(some), str(full)] if none.strip() and some.strip() and full.strip():
            return none, some, full
    raise StudyError(f"{where}: rubric must be three texts, for the grades 0, 1 and 2; got {given!r}.")


def _read_pairs(place: Place, prefix: str) -> list[Pair]:
    pairs = []
    for number, where, entry in read_json_lines(place, advice="give a file with one pair a line, each a JSON object"):
        fields = PAPER_SIDES if isinstance(entry, dict) and not set(SIDES) & set(entry) else SIDES
        scenario_id, positive, negative = (_text(entry, field, where) for field in ("scenario_id", *fields))
        # The paper's files have no ids; the line number serves as id, with a prefix for each of the two files.
        pair_id = _text(entry, "pair_id", where) if "pair_id" in entry else f"{prefix}-{number:03d}"
        writer = _text(entry, "source_model", where) if entry.get("source_model") is not None else None
        pairs.append(Pair(pair_id, scenario_id, positive, negative, writer))
    if not pairs:
        raise StudyError(f"{place}: holds no pairs; give at least one.")
    return pairs


def _text(entry: Any, field: str, where: str) -> str:
    if not isinstance(entry, dict):
        raise StudyError(f"{where}: got {type(entry).__name__}; it must be an object.")
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise StudyError(f"{where}: field {field} must be a non-empty string; got {value!r}.")
    return value


def _refuse_repeated(ids: list[str], field: str, place: object) -> None:
    if repeated := sorted({name for name in ids if ids.count(name) > 1}):
        raise StudyError(f"{place}: {field} {repeated[:5]} given more than once; each must be unique.")


def _place_of_pairs(source: Path | None) -> Place:
    return _bundled("pairs.jsonl") if source is None else source


def _bundled(name: str) -> Traversable:
    return resources.files("batch_jobs") / "data" / name
