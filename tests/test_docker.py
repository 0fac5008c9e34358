"""The Dockerfile, followed without its base image: what it copies is there, installs and serves."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_steer.engine.vllm_versions import SUPPORTED

PROJECT = Path(__file__).resolve().parents[1]
DOCKERFILE = PROJECT / "configs" / "docker" / "Dockerfile"
KNOWN = {"ARG", "FROM", "COPY", "RUN", "ENV", "HEALTHCHECK", "EXPOSE", "ENTRYPOINT"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, argument) in the order of the file."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    assert not any(line.endswith("\\") for line in lines)  # would need joining
    parted = [line.partition(" ") for line in lines]
    return [(name, argument) for name, _, argument in parted]


def argument_of(name: str) -> str:
    (argument,) = (argument for one, argument in instructions() if one == name)
    return argument


def test_it_holds_what_is_known_here_and_a_vllm_that_is_supported() -> None:
    assert {name for name, _ in instructions()} == KNOWN
    assert instructions()[0][0] == "ARG"
    version = argument_of("ARG").removeprefix("VLLM=v")
    assert version.rpartition(".")[0] in SUPPORTED
    assert argument_of("FROM") == "vllm/vllm-openai:${VLLM}"


@pytest.mark.slow
def test_its_steps_install_a_command_that_serves(tmp_path: Path, demo_model: Path) -> None:
    build = tmp_path / "build"
    for name, argument in instructions():
        if name == "COPY":
            *sources, target = shlex.split(argument)
            for source in sources:
                to = tmp_path / target.lstrip("/")
                if (PROJECT / source).is_dir():
                    shutil.copytree(PROJECT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    to.mkdir(parents=True, exist_ok=True)
                    shutil.copy(PROJECT / source, to)
    run = argument_of("RUN")
    assert run == 'python3 -m pip install --no-cache-dir "/build[cli]" && rm -r /build'
    # The same installation without dependencies, which are here already, and into a folder of its own.
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--target", str(site), str(build)], check=True, timeout=300)
    shutil.rmtree(build)
    name, value = argument_of("ENV").split("=")
    command, *words = json.loads(argument_of("ENTRYPOINT"))
    environment = {**os.environ, "PYTHONPATH": str(site), name: value}
    script = [sys.executable, "-P", str(site / "bin" / command), *words, str(demo_model), "--layers", "12", "--print"]
    shown = subprocess.run(
        script, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=300
    ).stdout
    assert "vllm_steer.server.vllm_serve serve" in shown
    assert shown.startswith("VLLM_PLUGINS=vllm_steer ")
