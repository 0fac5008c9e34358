"""The table of clients says what the tests of the clients show: their marker ``cell`` has the text of each cell.

Those tests run in an environment of their own, so they are read here and not imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.blocks import ROOT

COLUMNS = ("body", "header", "name", "whole", "stream", "id")
PAGE = ROOT / "docs" / "guides" / "clients.md"
Table = dict[str, dict[str, str]]


def marked() -> Iterator[tuple[str, str, str, str]]:
    """Client, column, text and test of each cell that a test of the clients is marked with."""
    for path in sorted((ROOT / "tests" / "clients").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = dict(_strings(tree))
        for node in tree.body:
            for call in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.cell":
                    assert isinstance(node, ast.FunctionDef)
                    assert node.name.startswith("test_"), f"{path.name}: {node.name} is no test"
                    [client] = call.args
                    for keyword in call.keywords:
                        assert keyword.arg in COLUMNS
                        text = ast.literal_eval(keyword.value)
                        yield names[ast.unparse(client)], keyword.arg, text, f"{path.name}::{node.name}"


def _strings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The module's constants that are strings."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                yield name, text


def shown() -> Table:
    """The table of the tests."""
    table: Table = {}
    for client, column, text, test in marked():
        known = table.setdefault(client, {}).setdefault(column, text)
        assert known == text, f"{test} says otherwise than another test: {client}, {column}"
    return table


def test_the_table_of_clients_says_what_their_tests_show() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows} == shown()


def test_every_client_with_tests_has_a_row() -> None:
    tested = {test.partition("::")[0] for *_, test in marked()}
    files = {path.name for path in (ROOT / "tests" / "clients").glob("test_*.py")}
    assert files - tested == {"test_guide.py", "test_inspect_provider.py"}  # they have a page of their own


def test_every_client_has_a_snippet() -> None:
    headings = set(re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {client.partition(":")[0] for client in shown()} <= headings
