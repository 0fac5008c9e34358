"""The README's example runs as it is written."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.engine
def test_readme_example_runs_as_written_and_alpha_moves_the_projection(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(blocks[0], encoding="utf-8")
    # Like a user's shell, without the settings that the suite makes for engines inside the test process, but with the
    # run's cache.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("VLLM_") or name == "VLLM_CACHE_ROOT"
    }
    # Its own session: the engine's processes hold the pipes too, and must be killed if the example hangs.
    example = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, log = example.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(example.pid, signal.SIGKILL)
    assert example.returncode == 0, log[-4000:]
    projections = [float(line.split()[0]) for line in printed.splitlines() if re.match(r" *-?\d+\.\d ", line)]
    assert len(projections) == 3, printed
    # α is part of the projection, which outweighs the differences of the texts: both have the same order.
    assert projections == sorted(projections)
    assert projections[2] - projections[0] > 40
