"""The README's example runs as it is written."""

from __future__ import annotations

import os
import re
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
    # A user's shell has none of the settings that the suite makes for engines inside the test process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    projections = [float(line.split()[0]) for line in done.stdout.splitlines() if re.match(r" *-?\d+\.\d ", line)]
    assert len(projections) == 3, done.stdout
    # α enters the projection itself, so its order is that of α by far more than the texts differ.
    assert projections == sorted(projections)
    assert projections[2] - projections[0] > 40
