"""The reference pages name what the code has, no more and no less."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import vllm_steer
from batch_jobs.config import concept, evaluation, primary, steering, study
from batch_jobs.rows import store
from batch_jobs.run import run_directory
from tests.docs.blocks import ROOT
from vllm_steer import client, errors
from vllm_steer.client import ServerUnreachable
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.steering import Steering
from vllm_steer.server.inbound.steered_routes import NAMING, STEERED
from vllm_steer.settings import SteerSettings

REFERENCE = ROOT / "docs" / "reference"
SECTIONS = {
    "Study": study.Study,
    "concept": concept.Concept,
    "concept.keywords": concept.Keywords,
    "engine": study.EngineOptions,
    "extract": study.Extraction,
    "split": study.SplitSizes,
    "validation": study.ValidationOptions,
    "steer": study.SteeringGrid,
    "A direction of a file": steering.DirectionFile,
    "controls": steering.Controls,
    "primary": primary.Primary,
    "sampling": study.Sampling,
}
_OWN_VARIABLE = re.compile(r"VLLM_STEER_[A-Z_]*[A-Z]")
_CODE = ("vllm_steer/**/*.py", "vllm_steer/**/*.js", "batch_jobs/**/*.py", ".ci/*", "benchmarks/**/*.py", "Makefile")


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def rows(text: str) -> Iterator[list[str]]:
    """The rows of all tables whose first cell is code, split at bars that are not escaped."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code(cell: str) -> str:
    return cell.strip("`")


def section(text: str, heading: str) -> str:
    """The text under a heading of the second or third level, up to the next heading of either."""
    return re.split(r"^###? ", re.split(rf"^###? {heading}$", text, flags=re.MULTILINE)[1], flags=re.MULTILINE)[0]


def defaults_of(schema: type[BaseModel]) -> dict[str, str]:
    """Field -> its default as a page shows it."""
    shown = {}
    for name, field in schema.model_fields.items():
        default: Any = None if field.is_required() else field.get_default(call_default_factory=True)
        if field.is_required():
            shown[name] = "required"
        else:
            shown[name] = "section" if isinstance(default, BaseModel) else f"`{json.dumps(default)}`"
    return shown


def files(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if path.is_file()]


def test_every_error_is_listed_with_its_code_and_status() -> None:
    listed = {code(row[0]): (code(row[1]), row[2]) for row in rows(page("errors.md").split("\n## ")[0])}
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.SteerError)]
    assert listed == {one.__name__: (one("").code, str(one.status)) for one in classes}


def test_the_clients_own_errors_are_listed() -> None:
    listed = {code(row[0]): code(row[1]) for row in rows(section(page("errors.md"), "In the client"))}
    own = {name for name in client.__all__ if issubclass(getattr(client, name), errors.SteerError)}
    assert set(listed) == own
    assert listed["ServerUnreachable"] == ServerUnreachable("").code
    assert listed["ServerRefusal"] == client.ServerRefusal("", 500).code


def test_every_setting_is_listed_with_its_default() -> None:
    assert {code(row[0]): row[1] for row in rows(page("settings.md"))} == defaults_of(SteerSettings)


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_field_of_a_study_is_listed_with_its_default(heading: str) -> None:
    listed = {code(row[0]): row[1] for row in rows(section(page("study-config.md"), heading))}
    expected = defaults_of(SECTIONS[heading])
    if heading == "concept":
        expected["poles"] = "from `name`"  # a section without poles gets them from its name
    assert listed == expected


def test_every_field_of_an_evaluation_is_listed_with_its_default() -> None:
    text = (ROOT / "docs" / "guides" / "harness.md").read_text(encoding="utf-8")
    listed = {code(row[0]): row[1] for row in rows(section(text, "A sweep"))}
    assert listed == defaults_of(evaluation.Evaluation)


def test_every_environment_variable_of_the_code_is_listed() -> None:
    listed = {code(row[0]) for row in rows(page("environment.md"))}
    own = {name for path in files(*_CODE) for name in _OWN_VARIABLE.findall(path.read_text(encoding="utf-8"))}
    assert own == {name for name in listed if _OWN_VARIABLE.fullmatch(name)}
    assert own | read_by_name() <= listed


def read_by_name() -> set[str]:
    """Environment variables whose names stand literally in the code that reads or writes them."""
    found = set()
    for path in files("vllm_steer/**/*.py", "batch_jobs/**/*.py", ".ci/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "setdefault"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    found.add(name)
                case ast.Subscript(value=ast.Attribute(attr="environ"), slice=ast.Constant(value=str(name))):
                    found.add(name)
    return found


def test_every_metric_is_listed() -> None:
    source = (ROOT / "vllm_steer/engine/front/metrics.py").read_text(encoding="utf-8")
    made = re.findall(r'\b(Counter|Gauge|Histogram)\(\s*"(\w+)"', source)
    series = {(f"{name}_total" if kind == "Counter" else name, kind.lower()) for kind, name in made}
    assert {(code(row[0]), row[1]) for row in rows(page("metrics.md"))} == series


def test_the_alerts_ask_for_series_that_the_dashboard_shows_and_fire_without_them() -> None:
    """A test of the dashboard compares its series with those of a server."""
    page = (ROOT / "docs" / "guides" / "production.md").read_text(encoding="utf-8")
    table = page.partition("Worth an alert:")[2]
    alerts = {
        cells[0]: cells[1].strip("`") for cells in re.findall(r"^\| ([\w ]+) \| (`[^`]+`) \|", table, re.MULTILINE)
    }
    assert list(alerts) == ["refusals", "a full bank", "no steering at all"]
    shown = (ROOT / "configs" / "monitoring" / "grafana-dashboard.json").read_text(encoding="utf-8")
    for alert, expression in alerts.items():
        for series in re.findall(r"vllm[:_]\w+", expression):
            assert series in shown, f"{alert}: {series}"
        counters = re.findall(r"([\w ()]*\()(?:rate|increase)\(vllm", expression)
        assert all("sum" in before for before in counters), f"{alert}: one alert for each series of the counter"
        if expression.endswith("== 0") or ") == 0 " in expression:
            assert "bank" in expression or "or vector(0)" in expression, f"{alert}: no series would be no alert"


def test_every_route_that_steers_is_listed_with_what_it_can_do() -> None:
    text = page("http.md")
    listed = {code(row[0]): row[1:] for row in rows(section(text, "Routes that take the fields"))}
    assert listed == {
        path: ["yes", "yes" if route.reads else "no", f"`{'.'.join(route.extra)}`" if route.extra else "none"]
        for path, route in STEERED.items()
    }
    assert [path for path in NAMING if f"`{path}`" not in text] == []


def test_every_field_of_a_request_is_listed() -> None:
    listed = [code(row[0]) for row in rows(section(page("http.md"), "Request"))]
    assert listed == [*Steering.__match_args__, *Readout.__match_args__]


def test_every_public_name_is_on_the_page_of_its_package() -> None:
    shown = set(re.findall(r"^::: vllm_steer\.(\w+)$", page("api.md"), re.MULTILINE))
    assert shown == set(vllm_steer.__all__) - {"__version__"}
    assert set(re.findall(r"^::: vllm_steer\.client\.(\w+)$", page("client.md"), re.MULTILINE)) == set(client.__all__)


def test_every_file_and_column_of_a_run_is_listed() -> None:
    text = page("run-directory.md")
    run = run_directory.RunDirectory(Path("run"))
    names = {result.name for result in (*run._results, run.provenance)}
    assert [name for name in sorted(names) if name not in text] == []
    columns = {code(cell) for row in rows(section(text, "Columns of a row")) for cell in row[0].split(", ")}
    assert columns == set(store.SCHEMA.names)
