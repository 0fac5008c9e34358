"""Requests stay exact whatever the scheduler does with them: priorities, preemption, restarts and aborts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.v1.core.sched.scheduler import Scheduler

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    Request,
    as_directions,
    check_against_reference,
    check_answers,
    mixed_batch,
    random_prompts,
    references,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from tests.support.worker_state import state_held
from vllm_steer import collect_readouts, register_directions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = [0, 2, NUM_LAYERS - 1]
MAX_TOKENS = 24
HIGH, LOW = 0, 10  # vLLM runs the lower number first


@dataclass(frozen=True)
class Arrival:
    """A request with an id of its own."""

    id: str
    request: Request
    priority: int = HIGH


@dataclass(frozen=True)
class Bed:
    """An engine, the reference of the same checkpoint, and the mixed batch with the reference's answers."""

    llm: LLM
    reference: Reference
    requests: list[Request]
    expected: list[ReferenceRun]

    def check(self, arrivals: Sequence[Arrival], outs: Mapping[str, RequestOutput]) -> None:
        """Assert that each of ``arrivals`` was answered as the reference answers it."""
        places = [self.requests.index(arrival.request) for arrival in arrivals]
        answers = [outs[arrival.id] for arrival in arrivals]
        reads = [read for (read,) in collect_readouts(self.llm, answers)]
        chosen, expected = [self.requests[i] for i in places], [self.expected[i] for i in places]
        assert check_answers(self.reference, chosen, expected, answers, reads) <= 2  # see test_parity


@pytest.fixture(scope="module")
def bed(checkpoint: Path, reference: Reference, open_engine: OpenEngine) -> Iterator[Bed]:
    vectors = unit_vectors(LAYERS, HIDDEN_SIZE, seed=51)
    requests = mixed_batch(vectors, random_prompts(VOCAB_SIZE, lengths=(31, 32, 33, 48, 79, 100), seed=52))
    expected = references(reference, requests, MAX_TOKENS)
    # Blocks for about five of the requests, see test_modes. Prompts of up to 100 tokens are prefilled in two steps.
    with open_engine(
        checkpoint,
        layers=LAYERS,
        scheduling_policy="priority",
        num_gpu_blocks_override=16,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    ) as llm:
        register_directions(llm, as_directions(vectors))
        yield Bed(llm, reference, requests, expected)


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[int]]]:
    """(internal id, priority, priorities of the requests that stayed running, in their order) per preempted request."""
    seen: list[tuple[str, int, list[int]]] = []
    original = Scheduler._preempt_request

    def noting(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append((request.request_id, request.priority, [other.priority for other in self.running]))
        original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noting)
    return seen


def drive(
    llm: LLM, arrivals: Mapping[int, Sequence[Arrival]], aborts: Mapping[int, Sequence[str]] | None = None
) -> dict[str, RequestOutput]:
    """Step the engine by hand until it is idle; arrivals and aborts happen before the step of their number.

    Returns:
        The finished outputs by id. Aborted requests have none.
    """
    engine, finished, aborts = llm.llm_engine, {}, aborts or {}
    for step in range(10_000):
        for arrival in arrivals.get(step, ()):
            params = arrival.request.params(max_tokens=MAX_TOKENS)
            prompt = {"prompt_token_ids": arrival.request.prompt_ids}
            engine.add_request(arrival.id, prompt, params, priority=arrival.priority)
        engine.abort_request(list(aborts.get(step, ())))
        if not engine.has_unfinished_requests():
            assert step > max((*arrivals, *aborts), default=-1), "the engine was idle before everything had come"
            return finished
        for output in engine.step():
            if output.finished:
                assert isinstance(output, RequestOutput)
                finished[output.request_id] = output
    raise AssertionError("the engine does not come to an end")


def held(llm: LLM) -> dict[str, int]:
    """What the worker keeps of requests, once vLLM has reported the last finished ones to it."""
    llm.llm_engine.step()
    (counts,) = llm.collective_rpc(state_held)
    return counts


@pytest.mark.conformance("priority scheduling", family="llama")
@pytest.mark.conformance("preemption", family="llama")
def test_requests_that_make_way_for_more_urgent_ones_are_exact(
    bed: Bed, preempted: list[tuple[str, int, list[int]]]
) -> None:
    low = [Arrival(f"low-{i}", request, LOW) for i, request in enumerate(bed.requests[::2])]
    high = [Arrival(f"high-{i}", request, HIGH) for i, request in enumerate(bed.requests[1::2])]
    outs = drive(bed.llm, {0: low, 4: high[:6], 12: high[6:]})
    bed.check([*low, *high], outs)
    assert all(priority >= max(others, default=LOW) for _, priority, others in preempted)
    # Without priorities, the last one running would have been preempted each time.
    assert any(others and others[-1] < priority for _, priority, others in preempted), "priorities changed nothing"
    by_id = {arrival.id: arrival.request for arrival in (*low, *high)}
    victims = [by_id[internal_id.rsplit("-", 1)[0]] for internal_id, _, _ in preempted]
    kinds = {(bool(victim.steering), victim.readout is not None) for victim in victims}
    assert {(True, True), (True, False)} <= kinds, kinds
    assert any(victim.readout and victim.readout.get("trace") for victim in victims)
    assert any(victim.readout and victim.readout.get("pool") == "rows" for victim in victims)


@pytest.mark.conformance("preemption", family="llama")
def test_requests_that_a_reset_of_the_cache_restarts_are_exact(
    bed: Bed, preempted: list[tuple[str, int, list[int]]]
) -> None:
    arrivals = [Arrival(f"restarted-{i}", request) for i, request in enumerate(bed.requests[:6])]
    engine = bed.llm.llm_engine
    for arrival in arrivals:
        params = arrival.request.params(max_tokens=MAX_TOKENS)
        engine.add_request(arrival.id, {"prompt_token_ids": arrival.request.prompt_ids}, params)
    for _ in range(9):  # some are generating, some are still being prefilled
        engine.step()
    before = len(preempted)
    assert bed.llm.reset_prefix_cache(reset_running_requests=True)
    assert len(preempted) > before
    bed.check(arrivals, drive(bed.llm, {}))


@pytest.mark.conformance("aborts", family="llama")
def test_aborts_disturb_nobody_and_leave_nothing_behind(bed: Bed) -> None:
    arrivals = [Arrival(f"mixed-{i}", request) for i, request in enumerate(bed.requests)]
    # While the first are generating, while some are being prefilled, and while the last are still waiting.
    aborts = {2: ["mixed-0", "mixed-23"], 9: ["mixed-1", "mixed-3", "mixed-30"], 20: ["mixed-4", "mixed-5"]}
    outs = drive(bed.llm, {0: arrivals[:24], 8: arrivals[24:]}, aborts)
    aborted = {request_id for ids in aborts.values() for request_id in ids}
    assert {arrival.id for arrival in arrivals} - set(outs) == aborted
    bed.check([arrival for arrival in arrivals if arrival.id not in aborted], outs)
    assert set(held(bed.llm).values()) == {0}, held(bed.llm)
    assert check_against_reference(bed.llm, bed.reference, bed.requests, bed.expected) <= 2  # see test_parity


@pytest.mark.conformance("aborts", family="llama")
@pytest.mark.conformance("n > 1", family="llama")
def test_an_abort_of_several_samples_gives_back_all_they_held(bed: Bed) -> None:
    request = next(one for one in bed.requests if one.steering and one.readout and one.readout.get("trace"))
    engine = bed.llm.llm_engine
    params = request.params(max_tokens=MAX_TOKENS, n=3, temperature=1.0)
    engine.add_request("samples", {"prompt_token_ids": request.prompt_ids}, params)
    for _ in range(6):
        engine.step()
    (counts,) = bed.llm.collective_rpc(state_held)
    assert counts["accumulators"] == counts["traced"] == 3
    engine.abort_request(["samples"])
    assert set(held(bed.llm).values()) == {0}, held(bed.llm)
