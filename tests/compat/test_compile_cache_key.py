"""A graph that vLLM compiled with another state of the plugin has another key in its compile cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.config import VllmConfig

import vllm_steer
from vllm_steer import settings, steer_config


def key() -> str:
    return str(VllmConfig(additional_config=steer_config([1, 2])).compute_hash())


@pytest.mark.slow
def test_the_plugins_build_enters_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    unconfigured = str(VllmConfig().compute_hash())
    ours = key()
    assert key() == ours  # the same build finds its graph again
    monkeypatch.setattr(settings, "plugin_build", lambda: "0.0.9+0123456789ab")
    upgraded = key()
    assert len({unconfigured, ours, upgraded}) == 3


def test_any_change_of_the_plugins_code_is_another_build(tmp_path: Path) -> None:
    package = tmp_path / "vllm_steer"
    shutil.copytree(Path(vllm_steer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def build() -> str:
        code = "from vllm_steer.settings import plugin_build; print(plugin_build())"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(tmp_path)},
        )
        return done.stdout

    before = build()
    assert build() == before
    hook = package / "ops" / "reference.py"
    hook.write_text(hook.read_text() + "# another line\n")
    changed = build()
    init = package / "__init__.py"
    init.write_text(init.read_text().replace(f'"{vllm_steer.__version__}"', '"9.9.9"'))
    assert len({before, changed, build()}) == 3
    assert build().startswith("9.9.9+")
