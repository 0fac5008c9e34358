"""Requests share KV exactly where they steer alike, and never read KV that other steering computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.v1.core.kv_cache_manager import KVCacheManager

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Entry, Reference
from tests.support.mixed_batch import (
    Request,
    Vectors,
    as_directions,
    check_answers,
    is_same_output,
    random_prompts,
    run,
    trace_name,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from vllm_steer import Direction, collect_readouts, register_directions

pytestmark = pytest.mark.engine

LAYER = 1
MAX_TOKENS = 40
# Two full blocks and six tokens: the third block holds the last prompt tokens and the first generated ones.
PROMPT_LEN = 2 * BLOCK_SIZE + 6
PROMPT_BLOCKS = 2 * BLOCK_SIZE


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return unit_vectors([LAYER], HIDDEN_SIZE, seed=21)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(checkpoint, layers=[LAYER], enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, vectors: Vectors) -> LLM:
    """The engine with an empty prefix cache and the directions as they were."""
    register_directions(engine, as_directions(vectors))
    assert engine.reset_prefix_cache()
    return engine


@pytest.fixture
def prompt() -> list[int]:
    return random_prompts(VOCAB_SIZE, lengths=(PROMPT_LEN,), seed=22)[0]


@pytest.fixture
def entry(vectors: Vectors) -> Callable[..., Entry]:
    def make(name: str = "calm", **fields: Any) -> Entry:
        defaults = {"layer": LAYER, "vector": vectors[name, LAYER], "alpha": 12.0, "op": "add", "span": "all"}
        return {"name": name, **(defaults | fields)}

    return make


def answer(llm: LLM, prompt: list[int], steering: list[Entry], readout: dict[str, Any] | None = None) -> RequestOutput:
    (out,), _ = run(llm, [Request(prompt, steering, readout)], max_tokens=MAX_TOKENS)
    return out


def tokens(out: RequestOutput) -> list[int]:
    return list(out.outputs[0].token_ids)


def assert_right(reference: Reference, out: RequestOutput, prompt: list[int], steering: list[Entry]) -> None:
    """The output is that of the reference, which caches nothing between requests. These prompts have no near tie."""
    expected = reference.generate(prompt, MAX_TOKENS, steering)
    assert is_same_output(out, expected, f"steering {[(e['name'], e['alpha'], e['span']) for e in steering]}")


@pytest.mark.conformance("prefix caching", family="llama")
def test_a_warm_cache_gives_every_request_its_own_uncached_output(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry]
) -> None:
    steering = [entry()]
    uncached = {}
    for name, entries in (("steered", steering), ("unsteered", [])):
        llm.reset_prefix_cache()
        uncached[name] = tokens(answer(llm, prompt, entries))
    assert uncached["steered"] != uncached["unsteered"]

    llm.reset_prefix_cache()
    first = answer(llm, prompt, steering)
    second = answer(llm, prompt, [])
    third = answer(llm, prompt, steering)
    fourth = answer(llm, prompt, [])
    assert [tokens(out) for out in (first, third)] == [uncached["steered"]] * 2
    assert [tokens(out) for out in (second, fourth)] == [uncached["unsteered"]] * 2
    # The first two share nothing, not even with each other; then each shares all full blocks with its own kind.
    assert [out.num_cached_tokens for out in (first, second, third, fourth)] == [
        0,
        0,
        PROMPT_BLOCKS,
        PROMPT_BLOCKS,
    ]
    for out, entries in ((third, steering), (fourth, [])):
        assert_right(reference, out, prompt, entries)


@pytest.mark.conformance("prefix caching", family="llama")
@pytest.mark.parametrize(
    "change",
    [{"alpha": 12.5}, {"alpha": -12.0}, {"op": "set"}, {"name": "bold"}, {"span": "generated"}],
    ids=str,
)
def test_steering_that_differs_in_anything_shares_nothing_of_a_steered_prompt(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry], change: dict[str, Any]
) -> None:
    answer(llm, prompt, [entry()])
    other = [entry(**change)]
    out = answer(llm, prompt, other)
    assert out.num_cached_tokens == 0
    assert_right(reference, out, prompt, other)


def test_the_order_of_entries_at_a_layer_is_part_of_the_key(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry]
) -> None:
    pair = [entry("calm"), entry("bold", op="set", alpha=-9.0)]
    answer(llm, prompt, pair)
    out = answer(llm, prompt, pair[::-1])
    assert out.num_cached_tokens == 0
    assert_right(reference, out, prompt, pair[::-1])


@pytest.mark.conformance("prefix caching", family="llama")
def test_steering_of_generated_tokens_shares_the_prompt_with_unsteered_requests(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry]
) -> None:
    steering = [entry(span="generated")]
    assert answer(llm, prompt, []).num_cached_tokens == 0
    out = answer(llm, prompt, steering)
    assert out.num_cached_tokens == PROMPT_BLOCKS
    assert_right(reference, out, prompt, steering)
    assert answer(llm, prompt, [entry("bold", span="generated", alpha=-7.0)]).num_cached_tokens == PROMPT_BLOCKS


@pytest.mark.conformance("multi-turn over the prefix cache", family="llama")
def test_blocks_with_steered_generated_tokens_are_not_read_as_a_prompt(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry]
) -> None:
    # The next turn of a conversation: the tokens that were generated and steered are prompt now, and not steered.
    steering = [entry(span="generated")]
    next_turn = prompt + tokens(answer(llm, prompt, steering))[:-1]
    assert len(next_turn) > PROMPT_BLOCKS + BLOCK_SIZE  # the block in question is full
    unsteered = answer(llm, next_turn, [])
    assert unsteered.num_cached_tokens == PROMPT_BLOCKS
    assert_right(reference, unsteered, next_turn, [])
    # The same steering again starts after this longer prompt, so it shares the blocks that the unsteered one wrote.
    again = answer(llm, next_turn, steering)
    assert again.num_cached_tokens == PROMPT_BLOCKS + BLOCK_SIZE
    assert_right(reference, again, next_turn, steering)


@pytest.mark.conformance("multi-turn over the prefix cache", family="llama")
def test_the_next_turn_of_a_wholly_steered_conversation_hits_the_whole_history(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry]
) -> None:
    steering = [entry()]
    next_turn = prompt + tokens(answer(llm, prompt, steering))[:-1]
    out = answer(llm, next_turn, steering)
    assert out.num_cached_tokens == len(next_turn) // BLOCK_SIZE * BLOCK_SIZE
    assert_right(reference, out, next_turn, steering)


@pytest.mark.conformance("prefix caching", family="llama")
def test_a_direction_replaced_under_its_name_never_hits_the_kv_of_the_old_one(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry], vectors: Vectors
) -> None:
    old = answer(llm, prompt, [entry("calm")])
    register_directions(llm, [Direction("calm", LAYER, vectors["bold", LAYER])])
    replaced = [entry("calm", vector=vectors["bold", LAYER])]
    out = answer(llm, prompt, replaced)
    assert out.num_cached_tokens == 0
    assert tokens(out) != tokens(old)
    assert_right(reference, out, prompt, replaced)


def test_the_same_vector_under_another_name_shares_its_kv(
    llm: LLM, reference: Reference, prompt: list[int], entry: Callable[..., Entry], vectors: Vectors
) -> None:
    answer(llm, prompt, [entry("calm")])
    register_directions(llm, [Direction("serene", LAYER, vectors["calm", LAYER])])
    alias = [entry("calm") | {"name": "serene"}]
    out = answer(llm, prompt, alias)
    assert out.num_cached_tokens == PROMPT_BLOCKS
    assert_right(reference, out, prompt, alias)


@pytest.mark.parametrize("is_steered", [False, True])
def test_a_trace_from_the_first_token_on_computes_every_token_itself_and_leaves_its_kv_to_others(
    llm: LLM, prompt: list[int], entry: Callable[..., Entry], is_steered: bool
) -> None:
    steering = [entry()] if is_steered else []
    readout = {"layers": [LAYER], "span": "prompt", "trace": [trace_name("bold", LAYER)]}
    assert answer(llm, prompt, steering, readout).num_cached_tokens == 0
    assert answer(llm, prompt, steering).num_cached_tokens == PROMPT_BLOCKS
    (out,), ((read,),) = run(llm, [Request(prompt, steering, readout)], max_tokens=MAX_TOKENS)
    assert out.num_cached_tokens == 0
    assert read is not None
    assert read.num_tokens == PROMPT_LEN


@pytest.mark.conformance("readouts behind cached tokens", family="llama")
@pytest.mark.parametrize(
    ("span", "num_cached"),
    [
        ("generated", PROMPT_BLOCKS),
        ("response", PROMPT_BLOCKS),
        ("prompt[-5:]", PROMPT_BLOCKS),
        (f"prompt[{BLOCK_SIZE + 1}:]", BLOCK_SIZE),
        (f"all[{BLOCK_SIZE}:]", BLOCK_SIZE),
        (f"all[{BLOCK_SIZE - 1}:]", 0),
        ("generated[3:]", PROMPT_BLOCKS),
    ],
)
@pytest.mark.parametrize("is_steered", [False, True])
def test_a_readout_takes_what_lies_before_its_span_from_the_cache(
    llm: LLM,
    reference: Reference,
    vectors: Vectors,
    prompt: list[int],
    entry: Callable[..., Entry],
    span: str,
    num_cached: int,
    is_steered: bool,
) -> None:
    steering = [entry()] if is_steered else []
    answer(llm, prompt, steering)
    request = Request(
        prompt, steering, {"layers": [LAYER], "span": span, "trace": [trace_name("bold", LAYER)]}, vectors
    )
    (out,), ((read,),) = run(llm, [request], max_tokens=MAX_TOKENS)
    assert out.num_cached_tokens == num_cached
    expected = [reference.generate(prompt, MAX_TOKENS, steering)]
    assert check_answers(reference, [request], expected, [out], [read]) == 0


def test_a_preempted_reader_computes_its_span_again_though_its_blocks_are_in_the_cache(
    llm: LLM,
    reference: Reference,
    vectors: Vectors,
    prompt: list[int],
    entry: Callable[..., Entry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, int]] = []  # tokens found for the request, and for one without a readout
    look_up = KVCacheManager.get_computed_blocks

    def noting(self: KVCacheManager, request: Any, *args: Any) -> Any:  # vLLM 0.33 gives a second argument
        plain = {name: getattr(request, name) for name in ("num_tokens", "block_hashes", "skip_reading_prefix_cache")}
        other = SimpleNamespace(**plain, sampling_params=None)
        found.append((look_up(self, request, *args)[1], look_up(self, other, *args)[1]))
        return look_up(self, request, *args)

    monkeypatch.setattr(KVCacheManager, "get_computed_blocks", noting)
    # The span begins in the third block, behind the last prompt tokens.
    readout = {"layers": [LAYER], "span": "generated[2:]", "trace": [trace_name("bold", LAYER)]}
    request = Request(prompt, [entry()], readout, vectors)
    llm.llm_engine.add_request("reader", {"prompt_token_ids": prompt}, request.params(max_tokens=MAX_TOKENS))
    outs: list[RequestOutput] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    while llm.llm_engine.has_unfinished_requests():
        if scheduler.running and scheduler.running[0].num_output_tokens in (3, 30):
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
        outs += [out for out in llm.llm_engine.step() if out.finished]
    assert found == [(0, 0), (PROMPT_BLOCKS, PROMPT_BLOCKS), (PROMPT_BLOCKS, PROMPT_BLOCKS + BLOCK_SIZE)]
    ((read,),) = collect_readouts(llm, outs)
    assert check_answers(reference, [request], [reference.generate(prompt, MAX_TOKENS, [entry()])], outs, [read]) == 0


@pytest.fixture
def over_prompt(
    reference: Reference, vectors: Vectors, prompt: list[int], entry: Callable[..., Entry]
) -> tuple[list[Entry], list[Entry]]:
    """Steering of the generated tokens under a condition over the prompt that holds by a little, and that fails so."""
    mean = float(reference.generate(prompt, 1).mean(LAYER, "prompt") @ vectors["bold", LAYER])
    when = {"name": "bold", "layer": LAYER, "vector": vectors["bold", LAYER], "over": "prompt"}
    # float32 moves the mean by less than 1e-5
    holds, fails = ([entry(span="generated", when={**when, "above": mean + off})] for off in (-1e-3, 1e-3))
    return holds, fails


@pytest.mark.conformance("conditions over the prompt", family="llama")
def test_a_condition_over_the_prompt_computes_all_of_it_and_shares_nothing_of_what_it_gates(
    llm: LLM,
    reference: Reference,
    prompt: list[int],
    entry: Callable[..., Entry],
    over_prompt: tuple[list[Entry], list[Entry]],
) -> None:
    holds, fails = over_prompt
    plain = [entry(span="generated")]
    kinds = {"nothing": [], "holds": holds, "fails": fails, "always": plain}
    order = ("nothing", "holds", "fails", "always", "holds", "nothing")
    outs = [answer(llm, prompt, kinds[name]) for name in order]
    for name, out in zip(order, outs, strict=True):
        assert_right(reference, out, prompt, kinds[name])
    assert [out.num_cached_tokens for out in outs] == [0, 0, 0, PROMPT_BLOCKS, 0, PROMPT_BLOCKS]
    nothing, held, failed, always, *_ = map(tokens, outs)
    assert held == always
    assert failed == nothing != held
    # The next turn: the same tokens are all prompt, or are steered by their position alone.
    next_turn = prompt + held[:-1]
    assert len(next_turn) > PROMPT_BLOCKS + BLOCK_SIZE
    for steering in ([], [entry(span=f"all[{PROMPT_LEN}:]")]):
        llm.reset_prefix_cache()
        answer(llm, prompt, holds)
        out = answer(llm, next_turn, steering)
        assert out.num_cached_tokens == PROMPT_BLOCKS
        assert_right(reference, out, next_turn, steering)
    for steering in over_prompt:  # over another prompt, now
        out = answer(llm, next_turn, steering)
        assert out.num_cached_tokens == 0
        assert_right(reference, out, next_turn, steering)


@pytest.mark.conformance("conditions over the prompt", family="llama")
@pytest.mark.conformance("preemption", family="llama")
def test_requests_with_conditions_over_the_prompt_are_exact_when_they_are_preempted(
    llm: LLM, reference: Reference, prompt: list[int], over_prompt: tuple[list[Entry], list[Entry]]
) -> None:
    requests = [Request(prompt, steering, None) for steering in over_prompt]
    for number, request in enumerate(requests):
        params = request.params(max_tokens=MAX_TOKENS)
        llm.llm_engine.add_request(f"gated-{number}", {"prompt_token_ids": prompt}, params)
    outs: dict[str, RequestOutput] = {}
    preempted: list[tuple[str, int]] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    while llm.llm_engine.has_unfinished_requests():
        for victim in [one for one in scheduler.running if one.num_output_tokens in (3, 30)]:
            scheduler.running.remove(victim)
            scheduler._preempt_request(victim, 0.0)
            preempted.append((victim.request_id.rsplit("-", 1)[0], victim.num_output_tokens))
        outs |= {out.request_id: out for out in llm.llm_engine.step() if out.finished}
    assert set(preempted) == {(f"gated-{number}", count) for number in range(2) for count in (3, 30)}
    for number, steering in enumerate(over_prompt):
        assert_right(reference, outs[f"gated-{number}"], prompt, steering)


def test_a_callers_own_cache_salt_still_separates_steered_requests(
    llm: LLM, prompt: list[int], entry: Callable[..., Entry]
) -> None:
    params = Request(prompt, [entry()], None).params(max_tokens=2)
    hits = [
        llm.generate([{"prompt_token_ids": prompt, "cache_salt": salt}], params, use_tqdm=False)[0].num_cached_tokens
        for salt in ("tenant one", "tenant two", "tenant one")
    ]
    assert hits == [0, 0, PROMPT_BLOCKS]
