"""The model on which pages and examples run, and the engine that replaces the one they start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vllm
from vllm import LLM
from vllm.model_executor.models import registry

import vllm_steer
from tests.engine.conftest import open_engine
from tests.support import tiny_models
from vllm_steer import Direction, save_directions
from vllm_steer.engine.front import offline
from vllm_steer.engine.front.admission import admission_of
from vllm_steer.settings import SteerSettings

HOOKED = (12, 16)
"""The layers that pages and examples hook."""
NUM_LAYERS = 17  # the smallest number with both of them


@pytest.fixture(scope="session")
def deep_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama that is as deep as the pages ask for."""
    with pytest.MonkeyPatch.context() as patch:
        architecture, fields = tiny_models._SUPPORTED["llama"]
        patch.setitem(tiny_models._SUPPORTED, "deep", (architecture, fields | {"num_hidden_layers": NUM_LAYERS}))
        return tiny_models.save_tiny_model("deep", demo_model, tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture(scope="module")
def engine(deep_model: Path) -> Iterator[LLM]:
    """One engine for all pages or examples of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())  # as in tests/engine, to save ten seconds
        with open_engine(deep_model, layers=list(HOOKED), max_model_len=512, disable_log_stats=False) as llm:
            yield llm


@pytest.fixture
def started_engine(engine: LLM, deep_model: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Return this engine, without directions, wherever one is started from here on."""

    def start(model: str, *, additional_config: dict[str, Any], **_: Any) -> LLM:
        assert model == str(deep_model)
        settings = SteerSettings.of(additional_config)
        assert settings is not None
        assert set(settings.layers) <= set(HOOKED)
        return engine

    monkeypatch.setattr(vllm, "LLM", start)
    monkeypatch.setattr(offline, "LLM", start)
    monkeypatch.setattr(vllm_steer, "close_llm", lambda llm: None)  # it is the module's
    monkeypatch.setattr("batch_jobs.demo_model.demo_model_path", lambda: deep_model)
    directions = admission_of(engine.llm_engine.input_processor).registry
    for name in {one.name for one in directions.all()}:
        directions.remove(name)
    directions.reclaim()
    return engine


def save_kind(path: Path, name: str = "kind") -> None:
    """Save a random unit direction of the deep model's at layer 16."""
    vector = np.random.default_rng(1).standard_normal(tiny_models.HIDDEN_SIZE)
    save_directions(path, [Direction(name, HOOKED[-1], vector).normalised()])
