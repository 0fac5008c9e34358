"""The conformance document: what the tests of one run have shown, by class of decoder layer, feature and family.

A test claims a cell with ``@pytest.mark.conformance(feature, family=..., refused=False)``; without ``family`` it is the
test's parameter of that name. A cell says ``exact`` or ``refused`` only if a test that claims it passed in this
run, and ``fails`` if one failed. A test that has asked the experiment at start-up records ``EXPERIMENT``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.support.architectures import ARCHITECTURES
from tests.support.tiny_configs import FAMILIES
from tests.support.tiny_configs import REFUSED as REFUSED_MODELS
from vllm_steer.engine.layer_classes import LAYER_CLASSES, REFUSED_ARCHITECTURES

PROPERTY = "conformance"
EXPERIMENT = "conformance-experiment"
"""Name of the property ``{"family": ..., "found": {class of decoder layer: convention}}`` of a test."""
LAYER_FEATURES = ("steering", "readout")  # what each class of decoder layer is compared in
OF_LAYERS = {*LAYER_FEATURES, "experiment"}  # in the table of classes; of these only the compared are features too
EXACT, REFUSED, FAILS, NOT_RUN = "exact", "refused", "fails", "not run"
_LETTERS = {EXACT: "E", REFUSED: "R", FAILS: "F", NOT_RUN: "."}
# Features that no test can show on a machine without an accelerator, and why.
NEVER_RUN = {
    "CUDA graphs": "need an NVIDIA GPU; tests/engine/exact/test_on_gpu.py ran on one, beside vLLM 0.24",
    "V2 model runner on an accelerator": "needs one; on a CPU it ran with Triton's interpreter, see its row",
    "sleep that frees memory": "needs a GPU; vLLM's CPU worker ignores sleep",
}
OTHER_FAMILIES = (
    "`not run` beside an `exact` of the same row: the feature acts in the scheduler or the front end, which do not "
    "know the family of the model, and is tested on the families that the row names."
)


@dataclass(frozen=True)
class Claim:
    """What a passing test shows."""

    feature: str
    family: str
    verdict: str


class ConformanceMatrix:
    """Collects the outcomes of a run.

    Args:
        target: the Markdown file to write at the end.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._seen: dict[tuple[str, str], dict[str, str]] = {}  # cell -> outcome -> why, "" where it needs no reason
        self._found: dict[str, set[str]] = {}  # class of decoder layer -> what the experiment said

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the outcome for each claim of a test's report."""
        for name, value in report.user_properties:
            if name == EXPERIMENT and report.when == "call" and report.passed:
                for path, convention in value["found"].items():  # type: ignore[index]
                    self._found.setdefault(path, set()).add(convention)
        claims = [Claim(**value) for name, value in report.user_properties if name == PROPERTY]  # type: ignore[arg-type]
        for claim in claims:
            outcomes = self._seen.setdefault((claim.feature, claim.family), {})
            if report.failed:
                outcomes[FAILS] = report.nodeid
            elif report.skipped:
                outcomes[NOT_RUN] = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            elif report.when == "call":
                outcomes[claim.verdict] = ""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Write the document and print the matrix."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(self.markdown(), encoding="utf-8")
        terminalreporter.section("conformance")
        terminalreporter.write(self.letters())
        terminalreporter.write_line(f"\n{self.target} says it in words.")

    # Ordered by claims, not by when tests end, so that two runs write the same document.
    @property
    def families(self) -> list[str]:
        """Model families, those with the most features first."""
        features = Counter(family for _, family in self._seen)
        return sorted(features, key=lambda family: (-features[family], family))

    @property
    def features(self) -> list[str]:
        """Features, those shown for the most families first."""
        families = Counter(feature for feature, _ in self._seen)
        return sorted(families, key=lambda feature: (-families[feature], feature.casefold()))

    def cell(self, feature: str, family: str) -> str:
        """The verdict on a feature for a family: both words where part of it is exact and part refused."""
        outcomes = self._seen.get((feature, family), {})
        if FAILS in outcomes:
            return FAILS
        return " + ".join(verdict for verdict in (EXACT, REFUSED) if verdict in outcomes) or NOT_RUN

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Yield (what, why) for all that did not run or failed."""
        for (feature, family), outcomes in sorted(self._seen.items()):
            if self.cell(feature, family) in (FAILS, NOT_RUN):
                yield f"{feature}, {family}", outcomes.get(FAILS) or outcomes.get(NOT_RUN) or "skipped"
        yield from NEVER_RUN.items()

    def markdown(self) -> str:
        """The document."""
        families = [one for one in self.families if {f for f, of in self._seen if of == one} - OF_LAYERS]
        rows = [
            ["", *families],
            ["---"] * (len(families) + 1),
            *(
                [feature, *(self.cell(feature, one) for one in families)]
                for feature in self.features
                if feature != "experiment"
            ),
        ]
        compared = {name for row in LAYER_CLASSES.values() for name in row.architectures if self._is_exact(name)}
        lines = [
            "# Conformance",
            "",
            "Made by `make conformance` from its test run; not to be edited. `exact`: steering and readout equal their "
            "float32 reference there. `refused`: asked for, it is refused by name.",
            "",
            "## Decoder layers",
            "",
            f"{len(compared)} architectures were compared with Hugging Face in float32: a batch of 65 requests with "
            "all operations, spans, readouts and traces, token for token and vector for vector. `experiment` is what "
            "the experiment at an engine's start said about the class, without knowing the table.",
            "",
            "| class of decoder layer | returns the stream as | steering | readout | experiment | compared in |",
            "|---|---|---|---|---|---|",
            *(f"| {' | '.join(cells)} |" for cells in self._layer_rows()),
            "",
            "Any other class starts only with `steer_config(unproven_model='experiment')`. Refused by name:",
            "",
            "| architecture | why |",
            "|---|---|",
            *(f"| {architecture} | {why} |" for architecture, why in sorted(REFUSED_ARCHITECTURES.items())),
            "",
            "## Features",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            OTHER_FAMILIES,
            "",
            "Not run at all, or failed:",
            "",
            *(f"- {what}: {why}" for what, why in self.reasons()),
        ]
        return "\n".join(lines) + "\n"

    def _layer_rows(self) -> Iterator[list[str]]:
        for row in sorted(LAYER_CLASSES.values(), key=lambda row: (row.convention, row.path)):
            cells = []
            for feature in LAYER_FEATURES:
                outcomes = {self._cell_of(feature, name) for name in row.architectures}
                cells.append(outcomes.pop() if len(outcomes) == 1 else " / ".join(sorted(outcomes)))
            found = ", ".join(sorted(self._found.get(row.path, ()))) or NOT_RUN
            yield [f"`{row.path}`", row.convention, *cells, found, ", ".join(row.architectures)]

    def _cell_of(self, feature: str, architecture: str) -> str:
        """The verdict on an architecture: the worst of its variants, such as one with experts and one without."""
        variants = [name for name, row in ARCHITECTURES.items() if (row.name or name) == architecture]
        outcomes = [self.cell(feature, variant) for variant in variants]
        return next((one for one in (FAILS, NOT_RUN, REFUSED) if one in outcomes), EXACT if outcomes else NOT_RUN)

    def _is_exact(self, architecture: str) -> bool:
        return all(self._cell_of(feature, architecture) == EXACT for feature in LAYER_FEATURES)

    def letters(self) -> str:
        """The matrix for a terminal: one column per family, with its name from top to bottom."""
        width = max(map(len, self.features), default=0)
        header = [
            " " * width + "".join(f" {letter}" for letter in letters)
            for letters in zip_longest(*self.families, fillvalue=" ")
        ]
        rows = [
            feature.ljust(width) + "".join(f" {self._letter(feature, family)}" for family in self.families)
            for feature in self.features
        ]
        legend = ["E exact, R refused, B some of each, F fails, . not run"]
        legend += [f"not run: {what}: {why}" for what, why in self.reasons()]
        return "\n".join((*header, *rows, "", *legend)) + "\n"

    def _letter(self, feature: str, family: str) -> str:
        return _LETTERS.get(self.cell(feature, family), "B")


def put_claims_on(items: Iterable[pytest.Item]) -> None:
    """Turn the markers of collected tests into properties of their reports, which also reach other processes."""
    for item in items:
        for marker in item.iter_markers("conformance"):
            item.user_properties.append((PROPERTY, _claim(item, *marker.args, **marker.kwargs)))  # type: ignore[arg-type]


def _claim(item: pytest.Item, feature: str, family: str | None = None, refused: bool = False) -> dict[str, str]:
    if family is None:
        call: Any = getattr(item, "callspec", None)
        if call is None or "family" not in call.params:
            raise pytest.UsageError(f"{item.nodeid} claims {feature!r} for no family; give family=, or parametrise it.")
        family = str(call.params["family"])
    # some tests know the architectures by short names
    family = (FAMILIES | REFUSED_MODELS).get(family, (family,))[0]
    return {"feature": feature, "family": family, "verdict": REFUSED if refused else EXACT}
