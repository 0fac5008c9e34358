"""lm-eval in the project's own environment, beside the engine (`make test-harnesses`).

lm-eval and what it needs lie in the environment of the clients. They are found behind the project's own packages, so
what both have is the engine's, as for a user who installs lm-eval beside vLLM.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parents[2]
(PACKAGES,) = (PROJECT / ".venv-clients").glob("lib/python*/site-packages")
sys.path.append(str(PACKAGES))

from batch_jobs.harnesses.lm_eval_model import SteeredLM  # noqa: E402  # its packages are on the path now
from tests.support.tiny_models import HIDDEN_SIZE, save_tiny_model  # noqa: E402
from vllm_steer import Direction, save_directions  # noqa: E402

LAYER, ALPHA, MAX_LEN = 2, 50.0, 256
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": MAX_LEN,
    "enforce_eager": True,
    "kv_cache_gib": 1 / 16,
    "disable_log_stats": True,
}
PROMPTS = ["Once upon a time there was", "The answer to the question of", "She looked at the old house and"]
ENDS = (" held", " rare loss", " a dog in it")
Task = dict[str, Any]


@pytest.fixture(scope="session")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama."""
    return save_tiny_model("llama", demo_model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def directions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with "kind" at `LAYER`, of length 1."""
    path = tmp_path_factory.mktemp("directions") / "kind.safetensors"
    vector = np.random.default_rng(0).standard_normal(HIDDEN_SIZE)
    save_directions(path, [Direction("kind", LAYER, vector).normalised()])
    return path


@pytest.fixture(scope="module")
def lm(model: Path, directions: Path) -> Iterator[SteeredLM]:
    """The model, unsteered; a test that steers it leaves it steered."""
    own = SteeredLM(str(model), directions=str(directions), **ENGINE)
    yield own
    own.close()


def local_task(folder: Path, name: str, **fields: Any) -> Task:
    """A task with a document for each of `PROMPTS`."""
    docs = folder / f"{name}.jsonl"
    docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    data = {"data_files": {"test": str(docs)}, "cache_dir": str(folder / "datasets")}
    source = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    return {"task": name, **source, "doc_to_text": "{{text}}", "target_delimiter": "", **fields}


@pytest.fixture
def choice(tmp_path: Path) -> Task:
    """Which of `ENDS` is the most likely one?"""
    return local_task(tmp_path, "choice", output_type="multiple_choice", doc_to_choice=list(ENDS), doc_to_target=0)


@pytest.fixture
def generation(tmp_path: Path) -> Task:
    """Eight greedy tokens."""
    limits = {"until": [], "max_gen_toks": 8}
    return local_task(tmp_path, "generation", output_type="generate_until", doc_to_target="", generation_kwargs=limits)
