"""A study of a tiny random model that runs in seconds, for tests that start real engines by the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny_models import save_tiny_model

PROJECT_ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "from batch_jobs.cli.main import main; main()", "study", "run")


def write_study(folder: Path, demo_model: Path, **changes: Any) -> Path:
    """Write the tiny model and a study of it into `folder`; returns the study's YAML. Greedy and in float32, so that
    the same row has the same tokens in any batch."""
    model = save_tiny_model("llama", demo_model, folder / "model")
    document = {
        "name": "tiny",
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 448,
        "engine": {"enforce_eager": True, "kv_cache_gib": 0.25, "max_alpha": 1e6},
        "skip_first": 1,
        "extract": {"layers": [1, 2], "max_tokens": 64},
        "validation": {"random_directions": 10, "bootstrap": 100},
        "steer": {
            "layers": [1, 2],
            "alphas": [-2, 0, 2],
            "alpha_unit": "residual_norm",
            "scenarios": ["the_listener", "the_maze"],
            "samples": 4,
        },
        "sampling": {"temperature": 0, "max_tokens": 48},
        "rows_per_part": 4,
        **changes,
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    return config


def environment() -> dict[str, str]:
    """The environment of a separate command: of the test process's Ray and engine settings only the offline ones."""
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}


def run_command(config: Path, out: Path, *options: str, cwd: Path = PROJECT_ROOT) -> subprocess.CompletedProcess[str]:
    """Run `vllm-steer study run` to its end."""
    return subprocess.run(
        [*COMMAND, str(config), "--out", str(out), *options],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
