"""Seeded requests: however their prompt is prefilled, the CPU engine survives and the samples repeat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import OpenEngine
from tests.support.mixed_batch import as_directions, random_prompts, unit_vectors
from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from vllm_steer import Steering, register_directions, steered

pytestmark = pytest.mark.engine

LAYER = 2
CHUNK = 16
VECTORS = unit_vectors([LAYER], HIDDEN_SIZE, seed=61)
PROMPTS = random_prompts(VOCAB_SIZE, lengths=(7, 40, 75, 100), seed=62)


@pytest.fixture(scope="module")
def unchunked(checkpoint: Path, open_engine: OpenEngine) -> list[list[list[int]]]:
    """The samples of an engine that takes every prompt in one step."""
    with open_engine(checkpoint, layers=[LAYER], enable_prefix_caching=False) as llm:
        register_directions(llm, as_directions(VECTORS))
        return samples(llm, PROMPTS)


@pytest.fixture(scope="module")
def llm(unchunked: list[list[list[int]]], checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    # Depends on `unchunked` because two engines cannot live in one process at the same time.
    with open_engine(
        checkpoint,
        layers=[LAYER],
        max_num_batched_tokens=CHUNK,
        max_num_seqs=CHUNK,
        enable_prefix_caching=False,
    ) as engine:
        register_directions(engine, as_directions(VECTORS))
        yield engine


def samples(llm: LLM, prompts: list[list[int]], seed: int = 100) -> list[list[list[int]]]:
    """Two seeded samples of every prompt, every other one steered, in one batch."""
    params = []
    for i in range(len(prompts)):
        seeded = SamplingParams(temperature=0.8, seed=seed + i, n=2, max_tokens=12, ignore_eos=True)
        params.append(steered(seeded, [Steering("calm", alpha=10.0)]) if i % 2 else seeded)
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [[list(sample.token_ids) for sample in out.outputs] for out in outs]


def test_a_seeded_prompt_in_several_chunks_does_not_kill_the_engine(llm: LLM) -> None:
    assert len(PROMPTS[3]) > 2 * CHUNK
    assert [len(sample) for sample in samples(llm, PROMPTS[3:])[0]] == [12, 12]
    assert len(samples(llm, PROMPTS[:1])[0]) == 2


def test_equal_seeds_give_equal_samples_and_other_seeds_others(llm: LLM) -> None:
    first = samples(llm, PROMPTS)
    assert samples(llm, PROMPTS) == first
    others = samples(llm, PROMPTS, seed=900)
    assert all(a != b for a, b in zip(first, others, strict=True))


def test_chunks_do_not_change_what_a_seed_gives(llm: LLM, unchunked: list[list[list[int]]]) -> None:
    # A sample depends on logits only through comparisons of exponentials, so rounding differences between the two
    # ways to prefill (1e-5) do not change these tokens; a generator that is one draw ahead changes nearly all of them.
    assert samples(llm, PROMPTS) == unchunked
