"""How far the raters of a run agree: its judges, people, and the keywords' verdict. Stored in `agreement.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pydantic

from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json
from batch_jobs.rows.generation_parts import answered, part_paths, read_part
from batch_jobs.scoring.agreement import Estimate, cohen_kappa, krippendorff_alpha
from batch_jobs.scoring.judgements import GRADES, KEYWORDS, Rater, grades_in
from batch_jobs.scoring.paper_metric import keyword_grade


@dataclass(frozen=True)
class RaterCounts:
    """What one rater gave."""

    name: str
    kind: str
    """`judge`, `human` or `keywords`."""
    model: str | None
    rows: int
    """Completions with a grade."""
    grades: tuple[int, int, int]
    """Of these, the number with grade 0, 1 and 2."""
    cut_off: int
    """Of these, the number that `sampling.max_tokens` cut off; the grade is for what there is."""


@dataclass(frozen=True)
class PairAgreement:
    """Agreement of two raters on the rows that both graded."""

    first: str
    second: str
    rows: int
    equal: float | None
    """Share of rows with equal grades; None without rows."""
    kappa: Estimate
    """Cohen's κ; every difference counts alike."""
    kappa_quadratic: Estimate
    """Cohen's κ with quadratic weights: grades 0 and 2 differ four times as much as neighbours."""
    kappa_full: Estimate
    """Cohen's κ of grade 2 against the others, which is what rates count."""


@dataclass(frozen=True)
class GroupAgreement:
    """Agreement of several raters on the rows that at least two of them graded."""

    raters: tuple[str, ...]
    rows: int
    nominal: Estimate
    """Krippendorff's α; every difference counts alike."""
    ordinal: Estimate
    """Krippendorff's α; a difference counts by the ratings between the grades."""


@dataclass(frozen=True)
class Agreement:
    """The raters of a run and their agreement."""

    outcome: str | None
    """Whose grades the scores use; None: nobody's."""
    raters: tuple[RaterCounts, ...]
    pairs: tuple[PairAgreement, ...]
    groups: tuple[GroupAgreement, ...]
    """Judges and people where there are several, then all raters."""

    @property
    def outcome_rater(self) -> RaterCounts | None:
        """Whose grades the scores use."""
        return next((rater for rater in self.raters if rater.name == self.outcome), None)


def rater_agreement(
    generations: Path,
    raters: Sequence[Rater],
    outcome: str | None,
    verdict: Callable[[str], int] | None = keyword_grade,
) -> Agreement:
    """Compare all raters with each other and with the keywords, with one part's texts in memory at a time.

    Args:
        generations: folder of Parquet parts.
        raters: with distinct names.
        outcome: name of the rater whose grades the scores use.
        verdict: the keywords' grade of a text; None where the study has no keywords.

    Raises:
        StudyError: a file of grades is malformed.
        ScoreError: a part cannot be read.
    """
    completions: set[str] = set()
    cut_off: set[str] = set()
    keywords: dict[str, int] = {}
    for part in part_paths(generations):
        for table in read_part(part):
            usable = answered(table).select(["row_id", "completion", "finish_reason"])
            for row in usable.to_pylist():
                completions.add(row["row_id"])
                if row["finish_reason"] == "length":
                    cut_off.add(row["row_id"])
                if verdict is not None:
                    keywords[row["row_id"]] = verdict(row["completion"])
    # grades of rows that are no longer there do not count
    given = {
        rater.name: {row: grade for row, grade in grades_in(rater.path).items() if row in completions}
        for rater in raters
    }
    counts = [_counts(rater.name, rater.kind, rater.model, given[rater.name], cut_off) for rater in raters]
    everybody = given
    if verdict is not None:
        counts.append(_counts(KEYWORDS, KEYWORDS, None, keywords, cut_off))
        everybody = given | {KEYWORDS: keywords}
    groups = [group for group in (given, everybody) if len(group) > 1]
    groups = groups[:1] if everybody is given else groups
    return Agreement(
        outcome=outcome,
        raters=tuple(counts),
        pairs=tuple(_pair(one, other, everybody) for one, other in combinations(everybody, 2)),
        groups=tuple(_group(group) for group in groups),
    )


def write_agreement(path: Path, agreement: Agreement) -> None:
    """Write as JSON, atomically."""
    write_atomically(path, json.dumps(asdict(agreement), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_agreement(path: Path) -> Agreement:
    """Read a file of `write_agreement`.

    Raises:
        StudyError: the file is absent or malformed; the message names it.
    """
    document = read_json(path, advice="score the run again")
    try:
        return _AGREEMENT.validate_python(document)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise StudyError(f"{path}: field {place}: {fault['msg']}; score the run again.") from error


_AGREEMENT = pydantic.TypeAdapter(Agreement)


def agreement_lines(agreement: Agreement) -> list[str]:
    """The agreement as lines of text: the raters, each pair, each group."""
    lines = []
    for rater in agreement.raters:
        role = ", the outcome" if rater.name == agreement.outcome else ""
        zero, one, two = rater.grades
        lines.append(
            f"{rater.name} ({rater.kind}{role}): {rater.rows} rows, {zero} graded 0, {one} graded 1, {two} graded 2, "
            f"{rater.cut_off} of them cut off"
        )
    for pair in agreement.pairs:
        equal = "no common rows" if pair.equal is None else f"equal {pair.equal:.2f}"
        lines.append(
            f"{pair.first} and {pair.second}: {pair.rows} rows, {equal}, Cohen's κ {estimate_text(pair.kappa)}, "
            f"quadratic {estimate_text(pair.kappa_quadratic)}, grade 2 or not {estimate_text(pair.kappa_full)}"
        )
    for group in agreement.groups:
        lines.append(
            f"{', '.join(group.raters)}: {group.rows} rows, Krippendorff's α nominal {estimate_text(group.nominal)}, "
            f"ordinal {estimate_text(group.ordinal)}"
        )
    return lines


def estimate_text(estimate: Estimate) -> str:
    """An estimate with its interval, e.g. `0.61 [0.42, 0.77]`; `undefined` where it is."""
    if estimate.value is None:
        return "undefined"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _counts(name: str, kind: str, model: str | None, grades: Mapping[str, int], cut_off: set[str]) -> RaterCounts:
    zero, one, two = (sum(grade == wanted for grade in grades.values()) for wanted in GRADES)
    return RaterCounts(name, kind, model, len(grades), (zero, one, two), len(cut_off & set(grades)))


def _pair(first: str, second: str, given: Mapping[str, Mapping[str, int]]) -> PairAgreement:
    common = sorted(set(given[first]) & set(given[second]))
    one = np.array([given[first][row] for row in common], dtype=np.int64)
    other = np.array([given[second][row] for row in common], dtype=np.int64)
    return PairAgreement(
        first=first,
        second=second,
        rows=len(common),
        equal=float(np.mean(one == other)) if common else None,
        kappa=cohen_kappa(one, other, grades=len(GRADES)),
        kappa_quadratic=cohen_kappa(one, other, grades=len(GRADES), weights="quadratic"),
        kappa_full=cohen_kappa(one == GRADES[-1], other == GRADES[-1], grades=2),
    )


def _group(given: Mapping[str, Mapping[str, int]]) -> GroupAgreement:
    rows = {row: number for number, row in enumerate(sorted({row for grades in given.values() for row in grades}))}
    counts = np.zeros((len(rows), len(GRADES)), dtype=np.int64)
    for grades in given.values():
        for row, grade in grades.items():
            counts[rows[row], grade] += 1
    return GroupAgreement(
        raters=tuple(given),
        rows=int((counts.sum(axis=1) >= 2).sum()),
        nominal=krippendorff_alpha(counts, "nominal"),
        ordinal=krippendorff_alpha(counts, "ordinal"),
    )
