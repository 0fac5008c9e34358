"""The packages whose vectors people bring, from the folder that `make peers` fills.

They lie outside the environment, because repeng asks for NumPy 1 and steering-vectors for transformers 4. Both run
beside newer ones, which the tests of their hooks show. A test is skipped without them; with
VLLM_STEER_REQUIRE_PEERS=1, as in `.ci/run`, it fails instead.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers"
REQUIRED = os.environ.get("VLLM_STEER_REQUIRE_PEERS") == "1"


def peer(name: str) -> ModuleType:
    """The package `name`, imported; the test that asks is skipped where it is not installed."""
    if not (FOLDER / name).is_dir():
        reason = f"{name} is not in {FOLDER}: run `make peers`"
        if REQUIRED:
            pytest.fail(f"{reason}, and VLLM_STEER_REQUIRE_PEERS=1 asks for it")
        pytest.skip(reason)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # at the end, so that the environment's own packages win
    if name == "repeng" and not hasattr(np, "float_"):
        # repeng 0.4.0 names it in annotations only; NumPy 2 no longer has it.
        np.float_ = np.float64  # type: ignore[attr-defined]
    return importlib.import_module(name)
