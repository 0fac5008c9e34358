"""The contents of a readout, also at the edges of its span, and the request that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Entry, Reference
from tests.support.mixed_batch import (
    READOUT_TOLERANCE,
    Request,
    Vectors,
    as_directions,
    check_readout,
    check_trace,
    random_prompts,
    references,
    run,
    trace_name,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from vllm_steer import Readout, ReadoutResult, Steering, collect_readouts, register_directions, steered
from vllm_steer.engine.front.admission import admission_of
from vllm_steer.errors import ReadoutUnavailable

pytestmark = pytest.mark.engine

LAYERS = [0, 1, 3]
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return unit_vectors(LAYERS, HIDDEN_SIZE, seed=31)


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine, vectors: Vectors) -> Iterator[LLM]:
    # Prompts of the lengths below need several steps, most of them beside other requests.
    with open_engine(
        checkpoint, layers=LAYERS, config={"trace_columns": 2}, max_num_batched_tokens=32, max_num_seqs=32
    ) as engine:
        register_directions(engine, as_directions(vectors))
        yield engine


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(VOCAB_SIZE, lengths=(1, 9, 32, 33, 70), seed=32)


@pytest.fixture
def bold(vectors: Vectors) -> Entry:
    return {
        "name": "bold",
        "layer": 1,
        "vector": vectors["bold", 1],
        "alpha": 14.0,
        "op": "add",
        "span": "all",
    }


def check(llm: LLM, reference: Reference, requests: list[Request]) -> list[ReadoutResult | None]:
    """Run greedily, compare every readout with the reference's, and return them. No near tie in these prompts."""
    _, reads = run(llm, requests, max_tokens=MAX_TOKENS)
    for request, (read,), truth in zip(requests, reads, references(reference, requests, MAX_TOKENS), strict=True):
        check_readout(read, request.readout, truth, request.label)
        check_trace(read, request, truth)
    return [read for (read,) in reads]


@pytest.mark.parametrize("span", ["prompt", "generated", "all"])
def test_the_mean_over_each_span_equals_the_reference(
    llm: LLM, reference: Reference, prompts: list[list[int]], bold: Entry, span: str
) -> None:
    asked = {"layers": LAYERS, "span": span}
    requests = [Request(prompt, steering, asked) for prompt in prompts for steering in ([], [bold])]
    reads = check(llm, reference, requests)
    for request, read in zip(requests, reads, strict=True):
        fed_back = MAX_TOKENS - 1
        count = {
            "prompt": len(request.prompt_ids),
            "generated": fed_back,
            "all": len(request.prompt_ids) + fed_back,
        }
        assert read is not None
        assert read.num_tokens == count[span]


@pytest.mark.parametrize("skip_first", [1, 8])
@pytest.mark.parametrize("span", ["prompt", "all"])
def test_skip_first_leaves_the_first_prompt_tokens_out(
    llm: LLM, reference: Reference, prompts: list[list[int]], span: str, skip_first: int
) -> None:
    asked = {"layers": LAYERS, "span": span, "skip_first": skip_first}
    check(llm, reference, [Request(prompt, [], asked) for prompt in prompts if len(prompt) > skip_first])


def test_a_readout_is_taken_after_the_steering_of_its_layer(
    llm: LLM, prompts: list[list[int]], vectors: Vectors, bold: Entry
) -> None:
    asked = {"layers": LAYERS, "span": "prompt"}
    _, ((plain,), (moved,)) = run(llm, [Request(prompts[1], s, asked) for s in ([], [bold])], max_tokens=1)
    assert plain is not None
    assert moved is not None
    # Layer 0 comes before the steering, so nothing moved there; at layer 1 the whole change is α·d. The tolerance is
    # float32 rounding of sums of values around 50.
    np.testing.assert_allclose(moved.mean[0], plain.mean[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moved.mean[1] - plain.mean[1], 14.0 * vectors["bold", 1], atol=1e-3)
    assert not np.allclose(moved.mean[3], plain.mean[3], atol=0.1)


def test_a_projection_is_the_inner_product_of_mean_and_direction(
    llm: LLM, prompts: list[list[int]], vectors: Vectors, bold: Entry
) -> None:
    asked = {"layers": [0, 3], "span": "all", "project": ["calm", "bold"]}
    _, reads = run(llm, [Request(prompt, [bold], asked) for prompt in prompts], max_tokens=MAX_TOKENS)
    for (read,) in reads:
        assert read is not None
        assert {name: set(by_layer) for name, by_layer in read.projections.items()} == {
            "calm": {0, 3},
            "bold": {0, 3},
        }
        for name, by_layer in read.projections.items():
            for layer, value in by_layer.items():
                scale = float(np.linalg.norm(read.mean[layer]))
                assert value == pytest.approx(float(read.mean[layer] @ vectors[name, layer]), abs=1e-5 * scale)


def test_without_vectors_only_the_projections_come_back(llm: LLM, prompts: list[list[int]], bold: Entry) -> None:
    full = {"layers": LAYERS, "span": "all", "project": ["calm"]}
    requests = [Request(prompts[4], [bold], asked) for asked in (full, full | {"vectors": False})]
    _, ((whole,), (scalars,)) = run(llm, requests, max_tokens=MAX_TOKENS)
    assert whole is not None
    assert scalars is not None
    assert scalars.mean == {}
    assert scalars.num_tokens == whole.num_tokens
    assert scalars.projections["calm"] == pytest.approx(whole.projections["calm"], rel=READOUT_TOLERANCE)


def test_only_requests_that_asked_get_a_readout(llm: LLM, reference: Reference, prompts: list[list[int]]) -> None:
    asked: list[dict[str, Any] | None] = [None, {"layers": [3]}, None, {"layers": [0], "span": "all"}, None]
    reads = check(llm, reference, [Request(prompt, [], want) for prompt, want in zip(prompts, asked, strict=True)])
    assert [read is None for read in reads] == [want is None for want in asked]


def test_a_generated_span_of_nothing_fed_back_is_nan_and_says_so(llm: LLM, prompts: list[list[int]]) -> None:
    _, ((read,),) = run(llm, [Request(prompts[1], [], {"layers": [0], "span": "generated"})], max_tokens=1)
    assert read is not None
    assert read.num_tokens == 0
    assert np.isnan(read.mean[0]).all()


def test_a_completion_that_stops_early_is_read_up_to_its_own_end(
    llm: LLM, reference: Reference, prompts: list[list[int]]
) -> None:
    # Stop at the fifth token of greedy decoding: that token is not fed back, four are.
    stop = reference.generate(prompts[2], 5).tokens[4]
    request = Request(prompts[2], [], {"layers": LAYERS, "span": "generated"})
    (out,), ((read,),) = run(llm, [request], max_tokens=MAX_TOKENS, stop_token_ids=[stop])
    generated = list(out.outputs[0].token_ids)
    assert generated[-1] == stop
    assert len(generated) <= 5
    check_readout(read, request.readout, reference.replay(prompts[2], generated), request.label)


@pytest.mark.conformance("n > 1", family="llama")
def test_samples_of_one_prompt_have_readouts_of_their_own(
    llm: LLM, reference: Reference, prompts: list[list[int]], bold: Entry
) -> None:
    asked = {"layers": LAYERS, "span": "all", "skip_first": 1}
    requests = [Request(prompt, [bold], asked) for prompt in prompts if len(prompt) > 1]
    outs, reads = run(llm, requests, n=3, temperature=1.0, max_tokens=MAX_TOKENS)
    for request, out, results in zip(requests, outs, reads, strict=True):
        assert len({tuple(sample.token_ids) for sample in out.outputs}) == 3
        for sample, result in zip(out.outputs, results, strict=True):
            truth = reference.replay(request.prompt_ids, list(sample.token_ids), request.steering)
            check_readout(result, request.readout, truth, f"sample {sample.index} of {request.label}")


def test_readouts_can_be_collected_later_and_twice(llm: LLM, prompts: list[list[int]]) -> None:
    asked = {"layers": [1], "span": "prompt"}
    earlier, ((first,),) = run(llm, [Request(prompts[3], [], asked)], max_tokens=2)
    run(llm, [Request(prompt, [], asked) for prompt in prompts], max_tokens=2)
    ((again,),) = collect_readouts(llm, earlier)
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first.mean[1], again.mean[1])


def test_the_callers_parameters_are_not_touched_and_text_prompts_work(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, extra_args={"mine": 1})
    copy = steered(params, [Steering("bold", layer=1, alpha=3.0)], readout=Readout(layers=[1]))
    outs = llm.generate(["One sentence.", "Two of them, no more."], copy, use_tqdm=False)
    reads = collect_readouts(llm, outs)
    assert params.extra_args == {"mine": 1}
    assert copy.extra_args is not None
    assert copy.extra_args["mine"] == 1
    for out, (read,) in zip(outs, reads, strict=True):
        assert read is not None
        assert read.num_tokens == len(out.prompt_token_ids or [])


TRACED = [trace_name("bold", 1), trace_name("calm", 3)]  # as many as the engine has columns


@pytest.mark.parametrize("span", ["prompt", "generated", "all"])
def test_a_trace_has_every_token_of_the_span_and_averages_to_the_projection(
    llm: LLM, reference: Reference, prompts: list[list[int]], vectors: Vectors, bold: Entry, span: str
) -> None:
    skip_first = 0 if span == "generated" else 1
    asked = {"layers": [3], "span": span, "skip_first": skip_first, "project": [TRACED[1]], "trace": TRACED}
    requests = [
        Request(prompt, steering, wanted, vectors)
        for prompt in prompts
        if len(prompt) > skip_first
        for steering, wanted in (([], asked), ([bold], asked), ([bold], None))
    ]
    for read in check(llm, reference, requests):
        if read is not None:
            mean = read.trace[TRACED[1]].astype(np.float64).mean()
            scale = float(np.linalg.norm(read.mean[3]))
            assert mean == pytest.approx(read.projections[TRACED[1]][3], abs=READOUT_TOLERANCE * scale)


def test_samples_of_one_prompt_have_traces_of_their_own(
    llm: LLM, reference: Reference, prompts: list[list[int]], vectors: Vectors
) -> None:
    request = Request(prompts[3], [], {"layers": [0], "span": "all", "vectors": False, "trace": TRACED}, vectors)
    (out,), (results,) = run(llm, [request], n=2, temperature=1.0, max_tokens=MAX_TOKENS)
    assert len({tuple(sample.token_ids) for sample in out.outputs}) == 2
    for sample, result in zip(out.outputs, results, strict=True):
        check_trace(result, request, reference.replay(request.prompt_ids, list(sample.token_ids)))


def test_a_trace_for_which_no_column_is_free_fails_with_a_reason_and_its_readout_does_not(
    llm: LLM, reference: Reference, prompts: list[list[int]], vectors: Vectors
) -> None:
    def request(*names: str) -> Request:
        return Request(prompts[1], [], {"layers": [0], "trace": list(names)}, vectors)

    requests = [request(*TRACED), request(trace_name("calm", 0)), request(TRACED[1])]
    with pytest.raises(ReadoutUnavailable, match="1 of 3 readouts") as caught:
        run(llm, requests, max_tokens=2)
    assert "2 trace columns were taken" in str(caught.value)
    assert set(caught.value.reasons) == {(1, 0)}
    whole, without, shared = (read for (read,) in caught.value.results)
    for read, asked in zip((whole, shared), (requests[0], requests[2]), strict=True):
        check_trace(read, asked, reference.generate(prompts[1], 2))
    assert without.trace == {}
    np.testing.assert_array_equal(without.mean[0], whole.mean[0])
    check(llm, reference, [requests[1]])  # alone it has its column


def test_the_values_of_a_running_request_can_be_asked_for_as_they_come(
    llm: LLM, reference: Reference, prompts: list[list[int]], vectors: Vectors
) -> None:
    prompt = prompts[4]  # 70 tokens: prefilled in three steps
    request = Request(prompt, [], {"layers": [0], "span": "all", "trace": TRACED}, vectors)
    engine, seen, counts = llm.llm_engine, [[], []], []  # type: ignore[var-annotated]
    engine.add_request("live", {"prompt_token_ids": prompt}, request.params(max_tokens=4))
    key = admission_of(engine.input_processor).asked["live"].key
    while engine.has_unfinished_requests():
        outputs = engine.step()
        (live,) = llm.collective_rpc("vllm_steer_traces", args=([(key, 0, len(seen[0]))],))[0]
        assert [name for name, _ in live] == TRACED
        seen = [known + new for known, (_, new) in zip(seen, live, strict=True)]
        counts.append(len(seen[0]))
    assert counts == [32, 64, 70, 71, 72, 73]
    truth = reference.generate(prompt, 4)
    ((read,),) = collect_readouts(llm, outputs)
    check_trace(read, request, truth)
    assert read is not None
    assert [read.trace[name].tolist() for name in TRACED] == seen
    assert llm.collective_rpc("vllm_steer_traces", args=([("unknown", 0, 0)],))[0] == [None]
