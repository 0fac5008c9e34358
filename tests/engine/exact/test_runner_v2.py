"""The V2 runner itself, on the CPU: see `on_v2_runner`, whose tests run in their own process.

vLLM decides when it is imported whether Triton is usable, so this process cannot run them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROJECT_ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.conformance("V2 model runner (CPU, kernels interpreted)", family="llama")
def test_the_v2_runner_gives_what_hugging_face_gives() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.interpreted_triton", "-p", "no:cacheprovider", "-q"]
    # PYTEST_ADDOPTS is for the run that this test is part of: with it, the child would overwrite that run's report.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    ran = subprocess.run(
        [*command, "tests/engine/exact/on_v2_runner.py"],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout
