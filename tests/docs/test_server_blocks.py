"""The code blocks that talk to a server, and the example that does, run against one server with a tiny random model."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.server.api_server import running
from tests.docs.blocks import ROOT, Block, asks_server, run_bash, run_script, to_run
from tests.docs.conftest import HOOKED, save_kind

pytestmark = [pytest.mark.slow, pytest.mark.server]

ADMIN_KEY = "admin-secret"
BLOCKS = [block for block in to_run() if asks_server(block)]


@pytest.fixture(scope="module")
def url(deep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server that the pages describe: the model "demo-model", the direction "kind", the alias "demo-kind"."""
    folder = tmp_path_factory.mktemp("server")
    save_kind(folder / "dirs.safetensors")
    settings = {
        "layers": HOOKED,
        "directions": str(folder / "dirs.safetensors"),
        "served_aliases": {"demo-kind": [{"direction": "kind", "alpha": 8.0, "layer": 16}]},
    }
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(deep_model),
        "--served-model-name",
        "demo-model",
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--kv-cache-memory-bytes",
        str(64 << 20),
    )
    environment = {"VLLM_PLUGINS": "vllm_steer", "VLLM_STEER_ADMIN_KEY": ADMIN_KEY}
    with running(command, folder / "server.log", **environment) as server:
        yield server.url


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_blocks_of_a_page_run_against_a_server(url: str, page: str, tmp_path: Path) -> None:
    assert run_script([block for block in BLOCKS if block.page == page and block.language == "python"], tmp_path, url)


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "bash"], ids=lambda one: one.place)
def test_shell_blocks_run_against_a_server(url: str, block: Block, tmp_path: Path) -> None:
    save_kind(tmp_path / "kind2.safetensors", "kind2")
    assert run_bash(block, tmp_path, {"VLLM_STEER_ADMIN_KEY": ADMIN_KEY, "API_KEY": "secret"}, url)


def test_the_example_of_a_server_runs(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server_openai.py", "demo-model", "--url", f"{url}/v1", "--direction", "kind"])
    runpy.run_path(str(ROOT / "examples" / "server_openai.py"), run_name="__main__")
    assert "projection" in capsys.readouterr().out
