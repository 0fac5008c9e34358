"""The snippets of docs/guides/clients.md run as written, but for the server's address, its names and its key."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ALIAS, API_KEY, MODEL, PROJECT, Served, ask
from tests.docs.blocks import SERVER_URL, Block, blocks_in

PAGE = "docs/guides/clients.md"
BLOCKS = blocks_in(PAGE, (PROJECT / PAGE).read_text(encoding="utf-8"))
SHARED = [block for block in BLOCKS if block.language == "python"][:2]
PYTHON = [block for block in BLOCKS if block.language == "python"][2:]
NODE = [block for block in BLOCKS if block.language == "javascript"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # a snippet closes nothing
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),  # of LiteLLM's own types
]


def adapted(block: Block, served: Served) -> str:
    """The source of a block, for the tests' server."""
    source = block.source.replace(SERVER_URL, served.url).replace("demo-model", MODEL).replace("demo-kind", ALIAS)
    return source.replace('"none"', f'"{API_KEY}"').replace("Bearer none", f"Bearer {API_KEY}")


@pytest.fixture(scope="module")
def answer(served: Served) -> tuple[str, float]:
    """The text and the projection that the snippets print."""
    fields = {"messages": [{"role": "user", "content": "How was your day?"}], "max_tokens": 16}
    plain, steered = (
        ask(served, "/v1/chat/completions", **fields, steering=spec, readout={"project": ["kind"], "span": "generated"})
        for spec in ([], [{"direction": "kind", "alpha": 5.0}])
    )
    [before], [choice] = plain["choices"], steered["choices"]
    value = choice["readout"]["projections"]["kind"][str(served.layer)]
    assert value > before["readout"]["projections"]["kind"][str(served.layer)] + 1
    return choice["message"]["content"], value


def is_said(printed: str, answer: tuple[str, float], served: Served) -> None:
    text, value = answer
    assert text in printed
    [found] = re.findall(rf"""kind['"]?: \{{ ?['"]{served.layer}['"]: ([-\d.]+)""", printed)
    assert float(found) == pytest.approx(value, rel=1e-5)  # of seven printed digits


@pytest.fixture(scope="module")
def shared(served: Served) -> dict[str, Any]:
    """The names that the page's blocks share, in the order of the page."""
    namespace: dict[str, Any] = {}
    for block in SHARED:
        exec(compile(adapted(block, served), block.place, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.place)
def test_a_python_snippet_prints_the_steered_text_and_its_projection(
    block: Block,
    served: Served,
    shared: dict[str, Any],
    answer: tuple[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("INSPECT_CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    exec(compile(adapted(block, served), block.place, "exec"), shared)
    is_said(capsys.readouterr().out, answer, served)


@pytest.mark.skipif(
    shutil.which("node") is None and "VLLM_STEER_REQUIRE_NODE" not in os.environ,
    reason="there is no node, and VLLM_STEER_REQUIRE_NODE is not set",
)
@pytest.mark.parametrize("block", NODE, ids=lambda block: block.place)
def test_a_snippet_for_node_prints_the_steered_text_and_its_projection(
    block: Block, served: Served, answer: tuple[str, float]
) -> None:
    command = ["node", "--input-type=module", "--eval", adapted(block, served)]
    folder = PROJECT / "tests" / "clients"  # where the packages are found
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    is_said(ran.stdout, answer, served)
