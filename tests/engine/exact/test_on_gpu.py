"""On a GPU an engine that replays CUDA graphs equals Hugging Face forward hooks, in every kind of graph that vLLM has.

Everything is in float32: the attention is Triton's, in IEEE arithmetic, since vLLM's faster ones have no float32. Needs
no model and no network.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    as_directions,
    check_against_reference,
    mixed_batch,
    random_prompts,
    references,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, save_tiny_model
from vllm_steer import register_directions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAX_TOKENS = 24
LAYERS = [0, 2, NUM_LAYERS - 1]
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE, seed=21)
REQUESTS = mixed_batch(VECTORS, random_prompts(VOCAB_SIZE, lengths=(3, 31, 32, 48, 79, 100), seed=22))


# One for each way in which a block passes the stream on: (h, r) and a single tensor.
@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(request.param, None, tmp_path_factory.mktemp("on-gpu") / request.param)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[ReferenceRun]:
    return references(reference, REQUESTS, MAX_TOKENS)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graphs that were replayed, one entry per replay."""
    replayed: list[torch.cuda.CUDAGraph] = []
    original = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        original(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return replayed


@pytest.mark.parametrize("graphs", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_replayed_graphs_give_what_hugging_face_gives(
    graphs: str,
    checkpoint: Path,
    reference: Reference,
    expected: list[ReferenceRun],
    replays: list[torch.cuda.CUDAGraph],
    open_engine: OpenEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    monkeypatch.setenv(
        "TRITON_CACHE_DIR", str(tmp_path)
    )  # a cache without kernels that were compiled for faster arithmetic
    with open_engine(
        checkpoint,
        layers=LAYERS,
        enforce_eager=False,
        compilation_config={"cudagraph_mode": graphs},
        attention_backend="TRITON_ATTN",
        skip_tokenizer_init=True,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.1,  # memory that must be free; so small a model takes much less
    ) as llm:
        register_directions(llm, as_directions(VECTORS))
        replays.clear()  # drop those of the warm-up
        excused = check_against_reference(llm, reference, REQUESTS, expected)
    assert excused <= 2  # see test_parity
    # Every token but the first comes from a step of at most one token a request, which fits a captured size.
    assert len(replays) >= MAX_TOKENS - 1, "the steps did not run from graphs"
