"""No request can spoil another one through values that steering leaves in the KV cache, in any dtype.

vLLM's attention reads the contents of stale blocks: finite values do no harm there, a NaN does. So a plain request is
compared with itself before and after requests that steer as strongly as allowed, on an engine with so few blocks that
it must reuse theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.mixed_batch import random_prompts, unit_vectors
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from tests.support.worker_state import state_held
from vllm_steer import Direction, Readout, Steering, collect_readouts, errors, register_directions, steered
from vllm_steer.engine.early_ends import CUT_OFF_REASON
from vllm_steer.ops.stream_range import LARGEST_ADDITION

pytestmark = pytest.mark.engine

LAYERS = list(range(NUM_LAYERS))
KIND = unit_vectors([1], HIDDEN_SIZE, seed=91)["calm", 1]
PEAK = float(np.abs(KIND).max())
MOST = {dtype: 0.999 * most / PEAK for dtype, most in LARGEST_ADDITION.items()}
FIELDS = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "logprobs": 1}
PROMPTS = [{"prompt_token_ids": ids} for ids in random_prompts(VOCAB_SIZE, lengths=(40, 41, 70), seed=92)]
# Prompts that end at many places of a block; the rest of the block holds values of an earlier request.
PLAIN = [{"prompt_token_ids": ids} for ids in random_prompts(VOCAB_SIZE, lengths=(1, 5, 20, 31, 33, 70), seed=93)]
# gpt2 passes the stream on as one tensor, llama as two parts.
ENGINES = [("gpt2", "float16"), ("llama", "float16"), ("gpt2", "bfloat16"), ("gpt2", "float32")]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def llm(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], open_engine: OpenEngine) -> Iterator[LLM]:
    family, dtype = request.param
    config = {"max_alpha": 1e30, "max_directions": 4}
    with open_engine(
        tiny_model(family), layers=LAYERS, config=config, dtype=dtype, num_gpu_blocks_override=12
    ) as engine:
        register_directions(engine, [Direction("kind", 1, KIND)])
        yield engine


def dtype_of(llm: LLM) -> str:
    return str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")


def plain(llm: LLM) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of unsteered requests."""
    answers = []
    for out in llm.generate(PLAIN, SamplingParams(**FIELDS), use_tqdm=False):
        (sample,) = out.outputs
        assert sample.logprobs is not None
        told = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        answers.append((list(sample.token_ids), told))
    return answers


def blocks_of_pool(llm: LLM) -> int:
    return int(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks or 0)


@pytest.mark.parametrize("span", ["all", "prompt", "generated"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_plain_request_is_the_same_before_and_after_others_steered_as_far_as_they_may(
    llm: LLM, span: str, sign: float
) -> None:
    llm.reset_prefix_cache()
    before = plain(llm)
    # More tokens than the pool holds, so that they use every block; at every layer, so that it adds up.
    entries = [Steering("kind", sign * MOST[dtype_of(llm)], layer=layer, span=span) for layer in LAYERS]
    asked = PROMPTS * 4
    assert sum(len(one["prompt_token_ids"]) for one in asked) > blocks_of_pool(llm) * BLOCK_SIZE
    outs = llm.generate(asked, steered(FIELDS, entries), use_tqdm=False)
    if dtype_of(llm) == "float16":
        for out in outs:
            (sample,) = out.outputs
            assert sample.finish_reason == "error"
            assert sample.stop_reason == CUT_OFF_REASON
            assert "float16" in str(sample.stop_reason)
            # Prompt tokens are steered before the first one is generated; generated ones after it.
            assert len(sample.token_ids) == (1 if span == "generated" else 0)
    else:
        assert {out.outputs[0].finish_reason for out in outs} == {"length"}
    llm.reset_prefix_cache()
    assert plain(llm) == before


def test_a_request_that_could_leave_the_range_at_one_layer_is_refused(llm: LLM) -> None:
    with pytest.raises(errors.BadAlpha, match=f"of the {dtype_of(llm)} stream"):
        llm.generate(PROMPTS[:1], steered(FIELDS, [Steering("kind", 1.01 * MOST[dtype_of(llm)])]), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.fixture
def float16(llm: LLM) -> LLM:
    if dtype_of(llm) != "float16":
        pytest.skip("only a float16 stream can be left after admission")
    return llm


TOO_MUCH = [Steering("kind", MOST["float16"], layer=layer) for layer in LAYERS]


def test_an_ended_request_leaves_its_neighbours_alone(float16: LLM) -> None:
    params = [SamplingParams(**FIELDS), steered(FIELDS, TOO_MUCH), steered(FIELDS, [Steering("kind", 3.0)])]
    expected = [float16.generate(PROMPTS[:1], params[index], use_tqdm=False)[0].outputs[0] for index in (0, 2)]
    outs = float16.generate(PROMPTS[:1] * 3, params, use_tqdm=False)
    assert [out.outputs[0].finish_reason for out in outs] == ["length", "error", "length"]
    assert [out.outputs[0].token_ids for out in (outs[0], outs[2])] == [one.token_ids for one in expected]


def test_an_ended_request_has_no_readout_and_the_others_have(float16: LLM) -> None:
    readout = Readout([1], "all")
    params = [steered(FIELDS, [], readout), steered(FIELDS, TOO_MUCH, readout)]
    outs = float16.generate(PROMPTS[:1] * 2, params, use_tqdm=False)
    with pytest.raises(errors.ReadoutUnavailable, match="1 of 2 readouts") as failed:
        collect_readouts(float16, outs)
    assert "beyond ±49152" in failed.value.reasons[1, 0]
    ((read,), (none,)) = failed.value.results
    assert none is None
    assert np.isfinite(read.mean[1]).all()


def test_each_sample_of_a_request_ends_for_itself(float16: LLM) -> None:
    """Only the last layer's steering of generated tokens is too strong, and so only once there are some."""
    entries = [Steering("kind", MOST["float16"], layer=layer, span="generated") for layer in LAYERS]
    (out,) = float16.generate(
        PROMPTS[:1], steered({**FIELDS, "n": 3, "temperature": 1.0, "seed": 5}, entries), use_tqdm=False
    )
    assert [sample.finish_reason for sample in out.outputs] == ["error"] * 3


def test_what_an_ended_request_computed_is_found_by_no_later_one(float16: LLM) -> None:
    """The same request is ended a second time, so it was computed again and not found in the cache."""
    float16.reset_prefix_cache()
    for _ in range(2):
        (out,) = float16.generate(PROMPTS[2:], steered(FIELDS, TOO_MUCH), use_tqdm=False)
        assert out.outputs[0].finish_reason == "error"
        assert not out.num_cached_tokens


def test_equal_requests_at_once_are_all_ended(float16: LLM) -> None:
    """The second takes the first one's blocks as they are being computed."""
    float16.reset_prefix_cache()
    outs = float16.generate(PROMPTS[2:] * 2, steered(FIELDS, TOO_MUCH), use_tqdm=False)
    assert [out.outputs[0].finish_reason for out in outs] == ["error"] * 2
    assert not float16.llm_engine.has_unfinished_requests()


def test_nothing_of_an_ended_request_is_left_on_the_worker(float16: LLM) -> None:
    float16.generate(PROMPTS, steered(FIELDS, TOO_MUCH, Readout([1], "all")), use_tqdm=False)
    plain(float16)
    (held,) = float16.collective_rpc(state_held)
    assert not any(held.values()), held
