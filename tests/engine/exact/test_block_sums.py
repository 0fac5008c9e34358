"""Readouts that take tokens of their span from the prefix cache equal those that compute every token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, RequestOutput

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Entry, Reference
from tests.support.mixed_batch import Request, Vectors, as_directions, check_answers, random_prompts, run, unit_vectors
from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from vllm_steer import Direction, ReadoutResult, collect_readouts, register_directions
from vllm_steer.engine.reader_blocks import BLOCK_SUMS
from vllm_steer.plan.block_sums import BlockSums

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = [0, 2]
MAX_TOKENS = 6
# Chunks of 72 tokens cut every second block of 32 in two.
CHUNK = 72
KV_BLOCKS = 24


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return unit_vectors(LAYERS, HIDDEN_SIZE, seed=31)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(
        checkpoint,
        layers=LAYERS,
        config={"block_sums_mib": 1},
        enable_prefix_caching=True,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=4,
        num_gpu_blocks_override=KV_BLOCKS,
    ) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, vectors: Vectors) -> LLM:
    """The engine with an empty prefix cache and the directions as they were."""
    register_directions(engine, as_directions(vectors))
    assert engine.reset_prefix_cache()
    assert not len(sums_of(engine))
    return engine


@pytest.fixture
def prompt() -> list[int]:
    return random_prompts(VOCAB_SIZE, lengths=(5 * BLOCK_SIZE + 7,), seed=32)[0]


def sums_of(llm: LLM) -> BlockSums:
    sums = BLOCK_SUMS.of(scheduler_of(llm).kv_cache_manager)
    assert sums is not None
    return sums


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def entry(vectors: Vectors, name: str = "calm", layer: int = 0, **fields: Any) -> Entry:
    defaults = {"layer": layer, "vector": vectors[name, layer], "alpha": 9.0, "op": "add", "span": "all"}
    return {"name": name, **(defaults | fields)}


def read(
    llm: LLM, prompt: list[int], readout: dict[str, Any], steering: list[Entry] | None = None
) -> tuple[RequestOutput, ReadoutResult]:
    (out,), ((result,),) = run(llm, [Request(prompt, steering or [], readout)], max_tokens=MAX_TOKENS)
    assert result is not None
    return out, result


def assert_right(
    reference: Reference,
    prompt: list[int],
    readout: dict[str, Any],
    answer: tuple[RequestOutput, ReadoutResult],
    steering: list[Entry] | None = None,
) -> None:
    """The answer is that of Hugging Face with hooks, to 1e-4 relative; no logits of these prompts are a near tie."""
    request = Request(prompt, steering or [], readout)
    expected = [reference.generate(prompt, len(answer[0].outputs[0].token_ids), steering or [])]
    assert check_answers(reference, [request], expected, [answer[0]], [answer[1]]) == 0


def assert_equal(one: ReadoutResult, other: ReadoutResult) -> None:
    assert one.num_tokens == other.num_tokens
    for pooled in ("mean", "last"):
        ours, theirs = getattr(one, pooled) or {}, getattr(other, pooled) or {}
        assert set(ours) == set(theirs)
        for layer, vector in ours.items():
            assert np.linalg.norm(vector - theirs[layer]) < 1e-4 * np.linalg.norm(vector)


@pytest.mark.conformance("readouts from the prefix cache", family="llama")
@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize(
    "span",
    ["prompt", "all", "all[1:]", "prompt[40:]", "all[64:]", "prompt[3:20]", "prompt[40:96]", "prompt[33:130]"],
)
@pytest.mark.parametrize("is_steered", [False, True])
def test_a_warm_cache_answers_as_a_cold_one(
    llm: LLM, reference: Reference, vectors: Vectors, prompt: list[int], span: str, pool: str, is_steered: bool
) -> None:
    steering = [entry(vectors)] if is_steered else []
    readout = {"layers": LAYERS, "span": span, "pool": pool, "project": ["calm"]}
    cold, warm = (read(llm, prompt, readout, steering) for _ in range(2))
    assert cold[0].num_cached_tokens == 0
    assert warm[0].num_cached_tokens == len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    assert_equal(cold[1], warm[1])
    for answer in (cold, warm):
        assert_right(reference, prompt, readout, answer, steering)


def test_what_was_not_read_is_a_miss_for_readers_alone(llm: LLM, reference: Reference, prompt: list[int]) -> None:
    whole = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    plain = {"layers": [0], "span": "generated"}
    readout = {"layers": [0], "span": "all[1:]"}
    assert read(llm, prompt, plain)[0].num_cached_tokens == 0
    assert read(llm, prompt, plain)[0].num_cached_tokens == whole
    for expected in (0, whole):  # no sums; its own
        answer = read(llm, prompt, readout)
        assert answer[0].num_cached_tokens == expected
        assert_right(reference, prompt, readout, answer)
    # Another layer has none; the new sums at both serve either. Another first token shares all blocks but its own.
    for layers, span, expected in (
        ([0, 2], "all[1:]", 0),
        ([2], "all[1:]", whole),
        ([0], "all[1:]", whole),
        ([2], "all[2:]", 0),
        ([2], "all[2:]", whole),
        ([2], "all[40:]", BLOCK_SIZE),
        ([2], "all[32:]", whole),
    ):
        readout = {"layers": layers, "span": span}
        answer = read(llm, prompt, readout)
        assert answer[0].num_cached_tokens == expected, (layers, span)
        assert_right(reference, prompt, readout, answer)


def test_prompts_that_share_a_beginning_share_its_sums(llm: LLM, reference: Reference, prompt: list[int]) -> None:
    readout = {"layers": LAYERS, "span": "all"}
    read(llm, prompt, readout)
    for keep in (3 * BLOCK_SIZE, 2 * BLOCK_SIZE + 5):
        other = prompt[:keep] + random_prompts(VOCAB_SIZE, lengths=(50,), seed=keep)[0]
        answer = read(llm, other, readout)
        assert answer[0].num_cached_tokens == keep // BLOCK_SIZE * BLOCK_SIZE
        assert_right(reference, other, readout, answer)
        longer = read(llm, other, readout)
        assert longer[0].num_cached_tokens == len(other) // BLOCK_SIZE * BLOCK_SIZE
        assert_equal(answer[1], longer[1])


def test_sums_belong_to_their_steering(llm: LLM, reference: Reference, vectors: Vectors, prompt: list[int]) -> None:
    readout = {"layers": LAYERS, "span": "prompt", "project": ["calm"]}
    for steering in ([], [entry(vectors)], [entry(vectors, alpha=-9.0)], [entry(vectors, "bold", 2)]):
        cold, warm = (read(llm, prompt, readout, steering) for _ in range(2))
        assert (cold[0].num_cached_tokens, warm[0].num_cached_tokens) == (0, 5 * BLOCK_SIZE)
        assert_right(reference, prompt, readout, warm, steering)
    # The name stands for another vector now.
    register_directions(llm, [Direction("calm", 0, vectors["bold", 0])])
    replaced = [entry(vectors, vector=vectors["bold", 0])]
    readout = {"layers": LAYERS, "span": "prompt"}
    cold, warm = (read(llm, prompt, readout, replaced) for _ in range(2))
    assert (cold[0].num_cached_tokens, warm[0].num_cached_tokens) == (0, 5 * BLOCK_SIZE)
    assert_right(reference, prompt, readout, warm, replaced)


def test_evicted_blocks_are_computed_again_and_their_sums_still_hold(
    llm: LLM, reference: Reference, prompt: list[int]
) -> None:
    """Other prompts take over the blocks, with and without readers."""
    readout = {"layers": LAYERS, "span": "all"}
    first = read(llm, prompt, readout)
    others = random_prompts(VOCAB_SIZE, lengths=(200,) * 4, seed=33)
    run(llm, [Request(other, [], readout if n % 2 else None) for n, other in enumerate(others)], max_tokens=2)
    again = read(llm, prompt, readout)
    assert again[0].num_cached_tokens == 0, "the blocks were not evicted"
    assert_equal(first[1], again[1])
    run(llm, [Request(other, [], None) for other in others], max_tokens=2)
    run(llm, [Request(prompt, [], None)], max_tokens=2)  # its KV again, computed without a reader
    warm = read(llm, prompt, readout)
    assert warm[0].num_cached_tokens == 5 * BLOCK_SIZE
    assert_equal(first[1], warm[1])
    assert_right(reference, prompt, readout, warm)


def test_a_reset_of_the_prefix_cache_forgets_the_sums(llm: LLM, prompt: list[int]) -> None:
    readout = {"layers": LAYERS, "span": "all"}
    read(llm, prompt, readout)
    assert len(sums_of(llm))
    assert llm.reset_prefix_cache()
    assert not len(sums_of(llm))
    run(llm, [Request(prompt, [], None)], max_tokens=2)  # equal KV, which after new weights would be other KV
    assert read(llm, prompt, readout)[0].num_cached_tokens == 0


def test_sums_make_room_for_others_when_all_slots_are_taken(
    llm: LLM, reference: Reference, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = sums_of(llm)
    monkeypatch.setattr(sums, "_num_slots", 8)
    sums.clear()
    readout = {"layers": LAYERS, "span": "all"}
    cached = []
    other = random_prompts(VOCAB_SIZE, lengths=(len(prompt),), seed=34)[0]
    for ids in (prompt, prompt, other, other, prompt, prompt):
        answer = read(llm, ids, readout)
        assert_right(reference, ids, readout, answer)
        cached.append((answer[0].num_cached_tokens or 0) // BLOCK_SIZE)
    assert cached[1] == cached[3] == cached[5] == 5
    assert cached[2] == 0
    assert 0 < cached[4] < 5, "the first blocks of a prompt stay longest"


@pytest.mark.conformance("readouts from the prefix cache", family="llama")
@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize(
    ("span", "found"),
    [
        ("all", [0, 4, 5, 5]),  # the sixth block holds generated tokens, whose sums are not kept
        ("prompt", [0, 4, 5, 5]),  # which holds the prompt's last tokens too
        ("prompt[3:20]", [0, 4, 5, 6]),
        ("response", [0, 4, 5, 5]),
    ],
)
def test_a_preempted_reader_resumes_from_the_sums(
    llm: LLM,
    reference: Reference,
    vectors: Vectors,
    prompt: list[int],
    span: str,
    found: list[int],
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Preempted within its prompt, right behind it, and after it has generated a block."""
    begun: list[int] = []
    sums = sums_of(llm)
    begin = sums.begin

    def noting(request_id: str, reader: Any, num_cached: int) -> bool:
        begun.append(num_cached // BLOCK_SIZE)
        return begin(request_id, reader, num_cached)

    monkeypatch.setattr(sums, "begin", noting)
    steering = [entry(vectors, span="generated")]
    readout = {"layers": LAYERS, "span": span, "pool": pool}
    request = Request(prompt, steering, readout)
    llm.llm_engine.add_request("reader", {"prompt_token_ids": prompt}, request.params(max_tokens=40))
    scheduler = scheduler_of(llm)
    outs: list[RequestOutput] = []
    due = [2 * CHUNK, len(prompt) + 3, len(prompt) + 30]
    while llm.llm_engine.has_unfinished_requests():
        if due and scheduler.running and scheduler.running[0].num_computed_tokens == due[0]:
            due.pop(0)
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
        outs += [out for out in llm.llm_engine.step() if out.finished]
    assert begun == found
    ((result,),) = collect_readouts(llm, outs)
    assert result is not None
    expected = [reference.generate(prompt, 40, steering)]
    assert check_answers(reference, [request], expected, outs, [result]) == 0


@pytest.mark.conformance("readouts from the prefix cache", family="llama")
def test_many_readers_at_once_are_each_right(llm: LLM, reference: Reference, vectors: Vectors) -> None:
    """More than run at once, of prompts with common beginnings: some compute a block that others find."""
    base, tails = random_prompts(VOCAB_SIZE, lengths=(100, 400), seed=35)
    spans = ["all", "prompt", "prompt[2:50]", "all[40:]", "prompt[-5:]"]
    requests = [
        Request(
            base[: 30 + 10 * (number % 7)] + tails[number : number + 60],
            [entry(vectors)] if number % 3 == 0 else [],
            {"layers": [LAYERS[number % 2]] if number % 4 else LAYERS, "span": spans[number % 5]},
        )
        for number in range(16)
    ]
    hits = 0
    for _ in range(2):
        outs, reads = run(llm, requests, max_tokens=MAX_TOKENS)
        hits = sum(out.num_cached_tokens or 0 for out in outs)
        expected = [reference.generate(one.prompt_ids, MAX_TOKENS, one.steering) for one in requests]
        results = [one for (one,) in reads]
        assert check_answers(reference, requests, expected, outs, results) == 0
    assert hits > 16 * BLOCK_SIZE
