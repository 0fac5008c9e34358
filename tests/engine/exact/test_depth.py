"""What holds in four random layers holds in a trained model of thirty: a mixed batch on SmolLM2, greedy and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import LLM

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Reference
from tests.support.mixed_batch import (
    Request,
    as_directions,
    check_answers,
    check_readout,
    check_trace,
    mixed_batch,
    run,
    run_over,
    share_changed_by_steering,
    unit_vectors,
)
from vllm_steer import register_directions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MAX_TOKENS = 24
LAYERS = [2, 9, 29]
VECTORS = unit_vectors(LAYERS, hidden_size=576)
TEXTS = (
    "The kitchen was quiet when the last order of the evening came in.",
    "Write a short note to a colleague who missed the deadline, and keep it friendly.",
    "List three reasons why a small bridge might need to be closed in winter:",
    "Once there was a lighthouse keeper who had not spoken to anybody for a year. One night a boat came in, and the "
    "man who stepped out of it asked for nothing but a cup of tea and somebody to listen. The keeper",
    "Question: what should I do when my neighbour is crying on the stairs?\nAnswer:",
    "def median(values):\n    ordered = sorted(values)\n",
)


@pytest.fixture(scope="module")
def checkpoint(demo_model: Path) -> Path:
    return demo_model


@pytest.fixture(scope="module")
def requests(checkpoint: Path) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return mixed_batch(VECTORS, [tokenizer.encode(text) for text in TEXTS])


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(checkpoint, layers=LAYERS) as engine:
        register_directions(engine, as_directions(VECTORS))
        yield engine


def test_a_mixed_batch_equals_hugging_face_hooks(llm: LLM, reference: Reference, requests: list[Request]) -> None:
    outs, reads = run(llm, requests, max_tokens=MAX_TOKENS)
    expected = [
        run_over(reference.confirm, request, out.outputs[0]) for request, out in zip(requests, outs, strict=True)
    ]
    assert all(one.has_stop or len(truth.tokens) == MAX_TOKENS for one, truth in zip(requests, expected, strict=True))
    assert check_answers(reference, requests, expected, outs, [read for (read,) in reads]) <= 2  # see test_parity
    assert share_changed_by_steering(reference, requests, expected) > 0.5


def test_readouts_of_sampled_completions_are_of_each_completion_its_own(
    llm: LLM, reference: Reference, requests: list[Request]
) -> None:
    chosen = [request for request in requests if request.readout][:10]
    outs, reads = run(llm, chosen, n=3, temperature=1.0, seed=5, max_tokens=MAX_TOKENS)
    for request, out, results in zip(chosen, outs, reads, strict=True):
        assert len(results) == 3
        for completion, result in zip(out.outputs, results, strict=True):
            truth = run_over(reference.replay, request, completion)
            check_readout(result, request.readout, truth, f"sample {completion.index} of {request.label}")
            check_trace(result, request, truth)
