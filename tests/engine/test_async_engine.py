"""The asynchronous engine with its core in a separate process, as a server runs it: many requests, all exact."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from tests.engine.conftest import BLOCK_SIZE, KV_BYTES
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    Request,
    Vectors,
    as_directions,
    check_answers,
    mixed_batch,
    random_prompts,
    references,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from tests.support.worker_state import state_held
from vllm_steer import Readout, ReadoutResult, Steering, save_directions, steer_config, steered
from vllm_steer.client.replies import reply_of
from vllm_steer.engine.front import async_generate
from vllm_steer.engine.front.admission import admission_of
from vllm_steer.engine.front.http_exchange import Exchange, current_exchange
from vllm_steer.engine.front.slots_in_flight import DRAIN_SECONDS
from vllm_steer.errors import MalformedSpec
from vllm_steer.server.inbound.steered_routes import CHAT
from vllm_steer.server.outbound.readouts_in_replies import complete_reply
from vllm_steer.server.registry.shared_registry import share_registry

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = [0, 2, NUM_LAYERS - 1]
MAX_TOKENS = 20
NUM_REQUESTS = 200
ABORTED = range(5, NUM_REQUESTS, 10)


@dataclass
class Answer:
    """The result of one request; `out` has all tokens and log-probabilities, however they were delivered."""

    out: RequestOutput | None = None
    read: ReadoutResult | None = None
    read_error: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Bed:
    """The engine and its event loop, the mixed batch, and the reference with its answers."""

    engine: AsyncLLM
    loop: asyncio.Runner
    reference: Reference
    vectors: Vectors
    requests: list[Request]
    expected: list[ReferenceRun]

    def run(self, todo: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run(todo)

    async def ask(self, request_id: str, request: Request, abort_after: int | None = None, **fields: Any) -> Answer:
        """Stream one request, as a server's handler would; an aborted one has no ``out``."""
        exchange, answer = Exchange(), Answer()
        current_exchange.set(exchange)
        params, prompt = request.params(**fields), {"prompt_token_ids": request.prompt_ids}
        async with aclosing(self.engine.generate(prompt, params, request_id)) as outputs:
            async for output in outputs:
                (sample,) = output.outputs
                if params.output_kind == RequestOutputKind.DELTA:
                    sample.token_ids = answer.token_ids = [*answer.token_ids, *sample.token_ids]
                    sample.logprobs = answer.logprobs = [*answer.logprobs, *(sample.logprobs or [])]
                if abort_after is not None and len(sample.token_ids) >= abort_after:
                    return answer
                answer.out = output
        reply = {"id": request_id, "model": "", "choices": [{"index": 0, "text": ""}]}
        if request.readout is not None:
            complete_reply(CHAT, reply, exchange)
        (choice,) = reply_of(reply).choices
        answer.read, answer.read_error = choice.readout, choice.readout_error
        return answer

    async def held(self) -> dict[str, int]:
        """Counts of what the worker and the front end still keep of requests."""
        (counts,) = await self.engine.collective_rpc(state_held)
        in_flight = admission_of(self.engine.input_processor).in_flight
        assert in_flight is not None
        return {**counts, "slots in flight": len(in_flight.use.busy())}


@pytest.fixture(scope="module")
def bed(checkpoint: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    vectors = unit_vectors(LAYERS, HIDDEN_SIZE, seed=71)
    requests = mixed_batch(vectors, random_prompts(VOCAB_SIZE, lengths=(4, 31, 32, 33, 70, 100), seed=72))
    expected = references(reference, requests, MAX_TOKENS)
    directions = tmp_path_factory.mktemp("directions") / "all.safetensors"
    save_directions(directions, as_directions(vectors))
    arguments = AsyncEngineArgs(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=32,
        max_num_batched_tokens=128,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=KV_BYTES,
        disable_log_stats=True,
        additional_config=steer_config(layers=LAYERS, directions=directions, max_directions=32, max_rows=4096),
    )
    with pytest.MonkeyPatch.context() as environment, asyncio.Runner() as loop:
        environment.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads by now
        environment.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a test function to the worker
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            # As a server does when it starts.
            loop.run(share_registry(admission_of(engine.input_processor), engine))
            async_generate.install()
            yield Bed(engine, loop, reference, vectors, requests, expected)
        finally:
            engine.shutdown()


def check(bed: Bed, asked: Sequence[Request], answers: Sequence[Answer], expected: Sequence[ReferenceRun]) -> None:
    assert [answer.read_error for answer in answers if answer.read_error] == []
    outs = [answer.out for answer in answers if answer.out is not None]
    reads = [answer.read for answer in answers]
    assert check_answers(bed.reference, asked, expected, outs, reads) <= len(asked) // 16  # see test_parity


@pytest.mark.conformance("async engine", family="llama")
@pytest.mark.conformance("aborts", family="llama")
def test_two_hundred_interleaved_requests_are_exact_and_leave_nothing_behind(bed: Bed) -> None:
    draw = np.random.default_rng(73)
    # From 4 on, since some steer or read from the third generated token on, which must then be computed.
    lengths = draw.integers(4, MAX_TOKENS, size=NUM_REQUESTS, endpoint=True).tolist()
    running, most, came_to_others = 0, 0, 0

    async def one(number: int) -> Answer:
        nonlocal running, most, came_to_others
        came_to_others += running > 0
        running += 1
        most = max(most, running)
        kind = RequestOutputKind.DELTA if number % 2 else RequestOutputKind.CUMULATIVE
        # Half of those that are aborted are being prefilled or still waiting, the others are generating.
        abort_after = (0 if number % 20 == 5 else 2) if number in ABORTED else None
        request = bed.requests[number % len(bed.requests)]
        max_tokens = MAX_TOKENS if number in ABORTED else lengths[number]
        try:
            return await bed.ask(f"r{number}", request, abort_after, max_tokens=max_tokens, output_kind=kind)
        finally:
            running -= 1

    async def all_of_them() -> list[Answer]:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for number in range(NUM_REQUESTS):
                tasks.append(group.create_task(one(number)))
                await asyncio.sleep(draw.exponential(0.005))
        return [task.result() for task in tasks]

    answers = bed.run(all_of_them())
    assert most > 32, "fewer ran at once than the engine takes in one batch"
    assert came_to_others > NUM_REQUESTS / 2
    assert all(answers[number].out is None or not answers[number].out.finished for number in ABORTED)
    finished = [number for number in range(NUM_REQUESTS) if number not in ABORTED]
    check(
        bed,
        [bed.requests[number % len(bed.requests)] for number in finished],
        [answers[number] for number in finished],
        [bed.expected[number % len(bed.requests)].first(lengths[number]) for number in finished],
    )

    async def idle() -> dict[str, int]:
        for _ in range(200):  # the engine hears of an abort a moment later, and the front end then hears of that
            counts = await bed.held()
            if not any(counts.values()):
                break
            await asyncio.sleep(DRAIN_SECONDS)
        return counts

    counts = bed.run(idle())
    assert set(counts.values()) == {0}, counts
    again = bed.run(bed.ask("after all", bed.requests[1], max_tokens=MAX_TOKENS))
    check(bed, bed.requests[1:2], [again], bed.expected[1:2])


@pytest.mark.conformance("stop strings", family="llama")
def test_a_readout_up_to_a_stop_string_is_exact_or_says_how_far_the_engine_ran_on(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    async def all_of_them() -> tuple[list[str], list[Answer]]:
        whole = await asyncio.gather(
            *(bed.ask(f"w{i}", request, max_tokens=MAX_TOKENS) for i, request in enumerate(bed.requests))
        )
        texts = [answer.out.outputs[0].text for answer in whole if answer.out is not None]
        stops = [text[len(text) // 2 :][:4] for text in texts]
        asked = (
            bed.ask(f"s{i}", request, max_tokens=MAX_TOKENS, stop=[stop])
            for i, (request, stop) in enumerate(zip(bed.requests, stops, strict=True))
        )
        return stops, await asyncio.gather(*asked)

    # One that ends by a watch may do so before its stop string comes.
    kept = [pair for pair in zip(bed.requests, bed.expected, strict=True) if not pair[0].has_stop]
    bed = replace(bed, requests=[one for one, _ in kept], expected=[truth for _, truth in kept])
    stops, answers = bed.run(all_of_them())
    exact = []
    for place, (stop, answer) in enumerate(zip(stops, answers, strict=True)):
        assert answer.out is not None
        sample = answer.out.outputs[0]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
        assert 0 < len(sample.token_ids) < MAX_TOKENS
        if answer.read_error is None:
            exact.append(place)
        else:
            assert "tokens too many, which can be subtracted" in answer.read_error
    truths = [bed.expected[i].first(len(answers[i].out.outputs[0].token_ids)) for i in exact if answers[i].out]
    check(bed, [bed.requests[i] for i in exact], [answers[i] for i in exact], truths)
    open_ended = [i for i in exact if (bed.requests[i].readout or {"span": "prompt"})["span"] != "prompt"]
    with capsys.disabled():
        print(f" [{len(exact)} of {len(answers)} exact]", end="")
    assert open_ended, "the front end was too slow for every one of them"


@pytest.mark.conformance("streaming input", family="llama", refused=True)
def test_a_streamed_prompt_is_refused_with_a_spec(bed: Bed) -> None:
    spec = [Steering("calm", layer=0, alpha=1.0)]

    async def ask(whole: SamplingParams, chunk: SamplingParams | None) -> None:
        async def prompt() -> Any:
            yield StreamingInput({"prompt_token_ids": [10, 20, 30]}, chunk)

        async with aclosing(bed.engine.generate(prompt(), whole, "streamed")) as outputs:
            async for _ in outputs:
                pass

    plain = SamplingParams(max_tokens=2, output_kind=RequestOutputKind.DELTA)
    for whole, chunk in (
        (steered(plain, spec), None),
        (plain, steered(plain, spec)),
        (steered(plain, readout=Readout(layers=[0])), None),
    ):
        with pytest.raises(MalformedSpec, match="streaming-input session"):
            bed.run(ask(whole, chunk))
