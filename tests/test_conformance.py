"""The conformance matrix says what tests have shown, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from tests.conformance import EXPERIMENT, PROPERTY, ConformanceMatrix, put_claims_on

Outcome = Literal["passed", "failed", "skipped"]


@pytest.fixture
def matrix(tmp_path: Path) -> ConformanceMatrix:
    return ConformanceMatrix(tmp_path / "matrix.md")


def report(
    outcome: Outcome,
    when: Literal["setup", "call", "teardown"] = "call",
    verdict: str = "exact",
    why: str = "",
    feature: str = "LoRA",
    family: str = "llama",
) -> pytest.TestReport:
    """pytest's report on one phase of a test that makes a claim."""
    claim = {"feature": feature, "family": family, "verdict": verdict}
    longrepr = ("file.py", 3, why) if outcome == "skipped" else None
    return pytest.TestReport(
        "file.py::test", ("file.py", 3, "test"), {}, outcome, longrepr, when, user_properties=[(PROPERTY, claim)]
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reports", "cell"),
    [
        ([report("passed", "setup"), report("passed"), report("passed", "teardown")], "exact"),
        ([report("passed", "setup"), report("failed"), report("passed", "teardown")], "fails"),
        ([report("failed", "setup")], "fails"),
        ([report("passed"), report("failed", "teardown")], "fails"),
        ([report("passed"), report("failed")], "fails"),
        ([report("passed", verdict="refused")], "refused"),
        ([report("passed"), report("passed", verdict="refused")], "exact + refused"),
        ([report("skipped", "setup", why="Skipped: no wheel")], "not run"),
        ([report("passed", "setup")], "not run"),
        ([], "not run"),
    ],
)
def test_a_cell_says_what_its_tests_have_shown(
    matrix: ConformanceMatrix, reports: list[pytest.TestReport], cell: str
) -> None:
    for one in reports:
        matrix.pytest_runtest_logreport(one)
    assert matrix.cell("LoRA", "llama") == cell


def test_the_reason_of_a_skip_and_the_test_that_failed_are_told(matrix: ConformanceMatrix) -> None:
    matrix.pytest_runtest_logreport(report("skipped", "setup", why="Skipped: no wheel"))
    assert ("LoRA, llama", "Skipped: no wheel") in list(matrix.reasons())
    matrix.pytest_runtest_logreport(report("failed"))
    assert ("LoRA, llama", "file.py::test") in list(matrix.reasons())


def test_the_document_and_the_letters_show_the_same_cells(matrix: ConformanceMatrix) -> None:
    matrix.pytest_runtest_logreport(report("passed"))
    assert "| LoRA | exact |" in matrix.markdown()
    assert "LoRA E\n" in matrix.letters()
    assert "     l\n     l\n     a\n     m\n     a\n" in matrix.letters()


def test_the_document_does_not_depend_on_which_test_ended_first(tmp_path: Path) -> None:
    claims = [("LoRA", "opt"), ("aborts", "llama"), ("LoRA", "llama"), ("steering", "bloom"), ("Beam", "llama")]
    documents = []
    for number, order in enumerate([claims, claims[::-1]]):
        matrix = ConformanceMatrix(tmp_path / f"{number}.md")
        for feature, family in order:
            matrix.pytest_runtest_logreport(report("passed", feature=feature, family=family))
        documents.append(matrix.markdown())
    assert documents[0] == documents[1]
    assert matrix.families == ["llama", "bloom", "opt"]
    assert matrix.features == ["LoRA", "aborts", "Beam", "steering"]


class FakeItem:
    """A collected test, as far as claims need one."""

    nodeid = "file.py::test"

    def __init__(self, marker: pytest.MarkDecorator, **params: str) -> None:
        self.marker, self.user_properties = marker.mark, list[tuple[str, Any]]()
        if params:
            self.callspec = type("CallSpec", (), {"params": params})

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [self.marker]


@pytest.mark.parametrize(
    ("item", "claim"),
    [
        (FakeItem(pytest.mark.conformance("LoRA", family="llama")), ("LoRA", "LlamaForCausalLM", "exact")),
        (FakeItem(pytest.mark.conformance("LoRA"), family="opt"), ("LoRA", "OPTForCausalLM", "exact")),
        (FakeItem(pytest.mark.conformance("LoRA"), family="AnotherModel"), ("LoRA", "AnotherModel", "exact")),
        (FakeItem(pytest.mark.conformance("DP", family="llama", refused=True)), ("DP", "LlamaForCausalLM", "refused")),
    ],
)
def test_a_marker_becomes_a_claim(item: FakeItem, claim: tuple[str, str, str]) -> None:
    put_claims_on([item])  # type: ignore[list-item]
    assert item.user_properties == [(PROPERTY, dict(zip(("feature", "family", "verdict"), claim, strict=True)))]


def test_a_claim_for_no_family_is_refused() -> None:
    with pytest.raises(pytest.UsageError, match="claims 'LoRA' for no family"):
        put_claims_on([FakeItem(pytest.mark.conformance("LoRA"))])  # type: ignore[list-item]


def experiment(family: str, found: dict[str, str], **fields: Any) -> pytest.TestReport:
    made = report("passed", feature="steering", family=family, **fields)
    made.user_properties.append((EXPERIMENT, {"family": family, "found": found}))
    return made


def test_a_class_is_exact_only_where_all_its_architectures_were_compared(matrix: ConformanceMatrix) -> None:
    path = "vllm.model_executor.models.deepseek_v2.DeepseekV2DecoderLayer"

    def row() -> str:
        (line,) = [line for line in matrix.markdown().splitlines() if line.startswith(f"| `{path}`")]
        return line

    assert "| fused | not run | not run | not run | DeepseekV2ForCausalLM, DeepseekV3ForCausalLM |" in row()
    matrix.pytest_runtest_logreport(experiment("DeepseekV2ForCausalLM", {path: "fused"}))
    assert "| fused | exact / not run | not run | fused |" in row()
    for feature in ("steering", "readout"):
        for family in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
            matrix.pytest_runtest_logreport(report("passed", feature=feature, family=family))
    assert "| fused | exact | exact | fused |" in row()
    assert "2 architectures were compared" in matrix.markdown()


def test_a_variant_that_fails_is_not_hidden_by_another(matrix: ConformanceMatrix) -> None:
    for family, outcome in (("Gemma4ForCausalLM", "passed"), ("Gemma4ForCausalLM, experts", "failed")):
        matrix.pytest_runtest_logreport(report(outcome, feature="steering", family=family))  # type: ignore[arg-type]
    (line,) = [line for line in matrix.markdown().splitlines() if "gemma4.Gemma4DecoderLayer" in line]
    assert "fails" in line
