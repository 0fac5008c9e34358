"""The code blocks of README and the pages run as written. Those that talk to a server: test_server_blocks.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_jobs.config.evaluation import Evaluation
from batch_jobs.config.server import ServerConfig
from batch_jobs.config.study import Study
from tests.docs.blocks import (
    ROOT,
    RUNNABLE,
    Block,
    all_blocks,
    asks_server,
    blocks_in,
    pages,
    run_bash,
    run_python,
    to_run,
)

ELSEWHERE = ("console", "javascript")
LANGUAGES = (*RUNNABLE, *ELSEWHERE, "yaml", "json", "mermaid")
HERE = [block for block in to_run() if not asks_server(block)]
ENGINE_PAGES = sorted({block.page for block in HERE if block.needs_engine})
OTHER_PAGES = sorted({block.page for block in HERE} - set(ENGINE_PAGES))
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def run_page(blocks: Sequence[Block], folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            run_python(block, namespace)
        else:
            run_bash(block, folder)


def test_every_code_block_is_run_or_says_why_it_is_not() -> None:
    silent = [block.place for block in all_blocks() if block.language in ELSEWHERE and block.reason is None]
    assert not silent, "make it a bash block, or write <!-- not run: reason --> right before it"
    unknown = [block.place for block in all_blocks() if block.language not in LANGUAGES]
    assert not unknown, f"name the language of the block: {', '.join(LANGUAGES)}"


@pytest.mark.parametrize(
    ("before", "is_run"),
    [
        ("<!-- not run: takes hours -->\n", False),
        ("<!-- not run:  -->\n", True),
        ("<!-- not run: takes hours -->\n\n", True),
        ("text\n", True),
        ("", True),
    ],
)
def test_only_a_reason_right_before_a_block_keeps_it_from_being_run(before: str, is_run: bool) -> None:
    (block,) = blocks_in("page.md", f"{before}```python\nprint(1)\n```\n")
    assert (block.reason is None) == is_run
    assert block.source == "print(1)\n"


def test_relative_links_of_readme_lead_to_files() -> None:
    links = [link[1] for link in _LINK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))]
    relative = [link for link in links if "://" not in link]
    assert relative
    assert [link for link in relative if not (ROOT / link).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_page_is_in_the_sites_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    assert {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")} <= listed


@pytest.mark.parametrize("block", [one for one in all_blocks() if one.language == "yaml"], ids=lambda one: one.place)
def test_yaml_blocks_are_configurations_that_are_accepted(block: Block) -> None:
    document = yaml.safe_load(block.source)
    schema = Evaluation if "tasks" in document else Study if "steer" in document else ServerConfig
    schema.model_validate(document)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.usefixtures("started_engine")
@pytest.mark.parametrize("page", ENGINE_PAGES)
def test_blocks_of_a_page_with_an_engine_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page([block for block in HERE if block.page == page], tmp_path)
    if page == "docs/guides/from-hooks.md":
        texts = re.findall(r"^(?:-1\.0|0\.0|1\.0) (['\"])(.*)\1$", capsys.readouterr().out, re.MULTILINE)
        assert len(texts) == 3
        assert all(re.search(r"\w{2,}", text) for _, text in texts), "each α shows words"


def test_a_block_that_makes_an_engine_can_stand_in_a_script_if_it_is_shown_as_a_whole() -> None:
    """vLLM's engine process imports the script again, so a bare LLM(...) would start an engine in the engine."""
    whole = [block for block in HERE if block.page in ("README.md", "docs/guides/from-hooks.md") and block.needs_engine]
    assert len(whole) == 2
    for block in whole:
        guard = block.source.index('if __name__ == "__main__":')
        assert guard < block.source.index("LLM(")
        rest = block.source[guard:].splitlines()[1:]
        assert all(not line or line.startswith("    ") for line in rest)
        nodes = list(ast.walk(ast.parse(block.source)))
        imported = {
            one.asname or one.name
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for one in node.names
        }
        assert imported <= {node.id for node in nodes if isinstance(node, ast.Name)}, "an import is not used"


@pytest.mark.parametrize("page", OTHER_PAGES)
def test_blocks_of_a_page_without_an_engine_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page([block for block in HERE if block.page == page], tmp_path)
