"""Engines in this process, one at a time, over tiny random checkpoints."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

from tests.support.hf_reference import Reference
from tests.support.tiny_models import save_tiny_model
from vllm_steer import steer_config

OpenEngine = Callable[..., AbstractContextManager[LLM]]

# The smallest block that vLLM's CPU attention takes; prefix sharing and preemption work in whole blocks.
BLOCK_SIZE = 32
KV_BYTES = 64 << 20
MAX_ROWS = 4096  # more than any request of these engines can have; the default allows none


@contextmanager
def open_engine(
    model: Path, *, layers: list[int] | None = None, config: dict[str, Any] | None = None, **engine_args: Any
) -> Iterator[LLM]:
    """An in-process float32 engine over `model`, torn down on exit so that the next one can start.

    Args:
        layers: the hooked layers; None leaves the plugin unconfigured.
        config: other settings of `steer_config`.
        engine_args: arguments of `vllm.LLM`, over eager defaults with little memory.
    """
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 64,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": KV_BYTES,
        "seed": 0,
        "disable_log_stats": True,
    }
    if layers is not None:
        arguments["additional_config"] = steer_config(layers=layers, **({"max_rows": MAX_ROWS} | (config or {})))
    llm: LLM | None = None
    try:
        llm = LLM(model=str(model), **(arguments | engine_args))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()  # also after a refused start, or the next engine finds the old process group
        # Collections at the next engine's start need not go through the half a million objects that remain.
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _model_classes_looked_at_in_this_process() -> Iterator[None]:
    """vLLM inspects a model class in a separate process, to leave CUDA alone: ten seconds a family. Do it here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="session", name="open_engine")
def open_engine_fixture() -> OpenEngine:
    """`open_engine`, for tests."""
    return open_engine


@pytest.fixture(scope="session")
def tiny_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)`: the checkpoint of that family, written on first use."""
    root = tmp_path_factory.mktemp("tiny-models")

    def path_of(family: str) -> Path:
        target = root / family
        return target if target.is_dir() else save_tiny_model(family, demo_model, target)

    return path_of


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[[str], Path]) -> Path:
    """The tiny llama, for modules that need one family only."""
    return tiny_model("llama")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    """The same checkpoint in Hugging Face with forward hooks."""
    return Reference(checkpoint)
