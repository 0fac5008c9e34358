"""Finished readouts on a worker: the mean of the right tokens, and the store that keeps them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.engine.resolved_spec import Held, Projected, ResolvedReadout, Traced
from vllm_steer.engine.worker.readout_copies import ReadoutFlow, Summed
from vllm_steer.engine.worker.readout_store import FinishedReadout, ReadoutStore
from vllm_steer.engine.worker.rows import rows_of
from vllm_steer.engine.worker.traces import Trace
from vllm_steer.engine.worker.worker_steering import sample_key
from vllm_steer.plan.batch_plan import PoolingState

SIZE, ACCUMULATOR = 6, 1
ROWS = np.random.default_rng(0).standard_normal((2, 5, SIZE)).astype(np.float32)  # (L, tokens, D)
DIRECTION = np.linspace(-1, 1, SIZE).astype(np.float32)
TRACED = np.random.default_rng(1).standard_normal((2, 5)).astype(np.float32)  # (C, tokens)


def spec(end: int | None = None, *, vectors: bool = True, project: bool = True, trace: bool = False) -> ResolvedReadout:
    projections = [Projected("kind", 7, 3)] if project else []
    traced = [Traced("kind", 1, 3), Traced("cold", 0, 2)] if trace else []
    return ResolvedReadout([4, 7], [0, 1], first=0, end=end, project=projections, vectors=vectors, trace=traced)


def trace_of(tokens: int, failure: str | None = None) -> Trace:
    trace = Trace(len(TRACED), failure)
    trace.reserve(tokens)
    trace.write(0, TRACED[:, :tokens])
    return trace


def make_buffers(max_requests: int) -> SteerBuffers:
    buffers = SteerBuffers(
        num_layers=2,
        hidden_size=SIZE,
        max_tokens=8,
        max_requests=max_requests,
        max_entries=1,
        max_directions=4,
        trace_columns=0,
        device=torch.device("cpu"),
    )
    buffers.write_directions([3], DIRECTION[None])
    return buffers


def finished(
    asked: ResolvedReadout, tokens: int = 5, failure: str | None = None, trace: Trace | None = None, kept: int = 0
) -> FinishedReadout:
    """The readout of a request with ``tokens`` summed tokens, and the rows of ``kept`` tokens before the last one."""
    buffers = make_buffers(2)
    for layer in range(2):
        buffers.sums_L_AD[layer][ACCUMULATOR] = torch.from_numpy(ROWS[layer, :tokens].sum(axis=0))
        buffers.last_L_AD[layer][ACCUMULATOR] = torch.from_numpy(ROWS[layer, max(tokens - 1, 0)])
    before = [torch.from_numpy(ROWS[:, token]) for token in range(tokens - 1 - kept, tokens - 1)]
    summed = Summed(asked, PoolingState(ACCUMULATOR, tokens, tokens, failure), trace, before)
    (taken,) = ReadoutFlow(buffers).take([summed])
    for layer in range(2):  # the next request with this accumulator, and a direction in the slot of a replaced one
        buffers.sums_L_AD[layer].fill_(99)
        buffers.last_L_AD[layer].fill_(99)
    buffers.write_directions([3], 99 * DIRECTION[None])
    return taken


def check_means(answer: dict[str, Any], tokens: int) -> None:
    expected = ROWS[:, :tokens].astype(np.float64).mean(axis=1)
    assert answer["num_tokens"] == tokens
    # float32 sums of five values around 1; a token too many errs by about 0.2
    got = np.frombuffer(answer["pooled"], np.float32).reshape(2, SIZE)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    ((name, layer, value),) = answer["projections"]
    assert (name, layer) == ("kind", 7)
    assert value == pytest.approx(float(expected[1] @ DIRECTION), abs=1e-5)


@pytest.mark.parametrize("end", [5, None], ids=["closed span", "open span"])
def test_a_finished_readout_is_the_mean_of_its_tokens(end: int | None) -> None:
    check_means(finished(spec(end)).answer(computed_end=5), 5)


def test_one_token_too_many_is_taken_back_out_of_an_open_span() -> None:
    """With asynchronous scheduling the next token is under way when a request turns out to be finished."""
    check_means(finished(spec()).answer(computed_end=4), 4)


@pytest.mark.parametrize("computed_end", [2, 3])
def test_as_many_tokens_as_rows_were_kept_of_are_taken_back_out(computed_end: int) -> None:
    """Another process finds a stop string, and the engine runs on until it hears of that."""
    check_means(finished(spec(), kept=2).answer(computed_end), computed_end)
    assert "allowed: up to 3 tokens too many" in finished(spec(), kept=2).answer(1)["error"]


@pytest.mark.parametrize("computed_end", [3, 6])
def test_any_other_number_of_tokens_is_an_error_and_never_a_number(computed_end: int) -> None:
    answer = finished(spec()).answer(computed_end)
    assert set(answer) == {"error"}
    assert f"up to token 5 but the sample ends at {computed_end}" in answer["error"]


def test_an_unfinished_prompt_and_a_failed_sum_are_errors() -> None:
    assert "5 of 6 prompt tokens" in finished(spec(end=6)).answer(6)["error"]
    assert finished(spec(), failure="a gap").answer(5) == {"error": "a gap"}


def test_a_mean_over_no_token_is_nan() -> None:
    answer = finished(spec(), tokens=0).answer(computed_end=0)
    assert answer["num_tokens"] == 0
    assert np.isnan(np.frombuffer(answer["pooled"], np.float32)).all()
    assert np.isnan(answer["projections"][0][2])


def last_of(taken: FinishedReadout, computed_end: int, token: int) -> None:
    """Assert that the readout has the row of a token."""
    answer = taken.answer(computed_end)
    np.testing.assert_array_equal(np.frombuffer(answer["pooled"], np.float32).reshape(2, SIZE), ROWS[:, token])
    ((_, _, value),) = answer["projections"]
    assert value == pytest.approx(float(ROWS[1, token].astype(np.float64) @ DIRECTION), abs=1e-5)


def test_the_last_token_is_that_of_the_sample_and_not_the_last_computed_one() -> None:
    last = replace(spec(), pool="last")
    last_of(finished(replace(spec(end=5), pool="last")), 7, 4)
    last_of(finished(last), 5, 4)
    last_of(finished(last, kept=2), 4, 3)
    last_of(finished(last, kept=2), 3, 2)
    refused = finished(last).answer(4)
    assert set(refused) == {"error"}
    assert "1 tokens before the last computed one, and the rows of 1 are kept" in refused["error"]
    nothing = finished(last, tokens=0).answer(0)
    assert np.isnan(np.frombuffer(nothing["pooled"], np.float32)).all()


@pytest.mark.parametrize("computed_end", [1, 3, 5])
def test_the_largest_projection_is_that_of_the_sample_s_own_tokens(computed_end: int) -> None:
    most = replace(spec(trace=True, project=False, vectors=False), pool="max", first=10)
    hidden = most.trace[1]._replace(layer=4, is_shown=False)
    taken = finished(replace(most, trace=[most.trace[0]._replace(layer=7), hidden]), trace=trace_of(5), kept=4)
    answer = taken.answer(computed_end)
    own = TRACED[:, :computed_end]
    assert answer["max"] == [
        ["kind", 7, float(own[0].max()), 10 + int(own[0].argmax())],
        ["cold", 4, float(own[1].max()), 10 + int(own[1].argmax())],
    ]
    assert [name for name, _ in answer["trace"]] == ["kind"]
    assert (answer["pooled"], answer["projections"]) == (None, [])


def test_there_is_no_largest_of_no_token() -> None:
    most = replace(spec(trace=True, project=False), pool="max")
    assert [str(one) for one in finished(most, tokens=0, trace=trace_of(0)).answer(0)["max"][0]] == [
        "kind",
        "-1",
        "nan",
        "-1",
    ]


@pytest.mark.parametrize("computed_end", [4, 5])
def test_a_trace_ends_where_its_readout_ends(computed_end: int) -> None:
    answer = finished(spec(trace=True), trace=trace_of(5)).answer(computed_end)
    check_means(answer, computed_end)
    assert answer["trace_error"] is None
    assert [name for name, _ in answer["trace"]] == ["kind", "cold"]
    for (_, values), expected in zip(answer["trace"], TRACED, strict=True):
        np.testing.assert_array_equal(np.frombuffer(values, np.float32), expected[:computed_end])


def test_a_failed_trace_leaves_its_readout_whole_and_says_why() -> None:
    answer = finished(spec(trace=True), trace=trace_of(0, "no column")).answer(5)
    check_means(answer, 5)
    assert (answer["trace"], answer["trace_error"]) == ([], "no column")


def test_the_store_counts_the_bytes_of_a_trace() -> None:
    assert finished(spec(trace=True), trace=trace_of(5)).num_bytes - finished(spec()).num_bytes == TRACED.nbytes


def stored(tokens: int, written: int = 5, end: int | None = None) -> FinishedReadout:
    """The rows of a request that has computed ``tokens`` tokens, of which ``written`` have arrived."""
    rows = rows_of(2, SIZE)
    rows.reserve(5)
    rows.write(0, ROWS[:, :written])
    asked = replace(spec(end, vectors=False, project=False), pool="rows")
    summed = Summed(asked, PoolingState(ACCUMULATOR, tokens, tokens), None, rows=rows)
    (taken,) = ReadoutFlow(make_buffers(2)).take([summed])
    return taken


@pytest.mark.parametrize("computed_end", [1, 3, 5])
def test_rows_end_where_the_sample_ends_however_many_tokens_too_many_there_are(computed_end: int) -> None:
    answer = stored(5).answer(computed_end)
    assert (answer["num_tokens"], answer["pooled"]) == (computed_end, None)
    assert [(layer, size) for layer, size, _ in answer["rows"]] == [(4, SIZE), (7, SIZE)]
    for (_, _, rows), expected in zip(answer["rows"], ROWS, strict=True):
        np.testing.assert_array_equal(np.frombuffer(rows, np.float32).reshape(-1, SIZE), expected[:computed_end])


def test_rows_that_are_missing_are_an_error_and_never_fewer_rows() -> None:
    assert stored(5, written=4).answer(5) == {"error": "4 of the rows of 5 tokens have arrived from the device"}
    assert "up to token 3 but the sample ends at 5" in stored(3).answer(5)["error"]
    assert "3 of 5 prompt tokens" in stored(3, end=5).answer(5)["error"]


def test_the_store_counts_the_bytes_of_rows() -> None:
    assert stored(5).num_bytes >= ROWS.nbytes
    store = ReadoutStore(2 * stored(5).num_bytes)
    for name in "abc":
        store.put(name, 0, stored(5))
    assert [store.get(name, 0) is not None for name in "abc"] == [False, True, True]


def test_only_what_was_asked_is_kept() -> None:
    numbers = finished(spec(vectors=False))
    assert numbers.answer(5)["pooled"] is None
    assert numbers.num_bytes == 2 * 4  # the sum's projection and the last row's
    assert finished(spec(project=False)).answer(5)["projections"] == []


def test_the_store_gives_up_collected_readouts_first_and_then_the_oldest() -> None:
    size = finished(spec()).num_bytes
    store = ReadoutStore(2 * size)
    store.put("a", 0, finished(spec()))
    store.put("b", 0, finished(spec()))
    assert store.get("b", 0) is store.get("b", 0) is not None  # it can be looked at again
    store.put("c", 0, finished(spec()))
    assert [store.get(name, 0) is not None for name in "abc"] == [True, False, True]
    store = ReadoutStore(2 * size)
    for name in "abc":
        store.put(name, 0, finished(spec()))
    assert [store.get(name, 0) is not None for name in "abc"] == [False, True, True]
    assert store.get("c", 1) is None


def test_a_replaced_readout_does_not_count_twice_and_one_too_large_is_kept() -> None:
    size = finished(spec()).num_bytes
    store = ReadoutStore(2 * size)
    store.put("a", 0, finished(spec()))
    for _ in range(5):
        store.put("b", 0, finished(spec()))
    assert store.get("a", 0) is not None
    small = ReadoutStore(1)
    small.put("a", 0, finished(spec()))
    assert small.get("a", 0) is not None


def test_readouts_that_are_taken_at_once_are_each_its_own() -> None:
    """Of every kind that gathers something else: open and closed spans, rows before the last, drafts, layers."""
    rows_ALD = np.random.default_rng(2).standard_normal((6, 2, SIZE)).astype(np.float32)
    buffers = make_buffers(6)
    for layer in range(2):
        buffers.sums_L_AD[layer].copy_(torch.from_numpy(rows_ALD[:, layer]))
        buffers.last_L_AD[layer].copy_(torch.from_numpy(-rows_ALD[:, layer]))
    before = [torch.full((2, SIZE), value) for value in (10.0, 20.0)]
    one_layer = ResolvedReadout([7], [1], first=0, end=None, project=[Projected("kind", 7, 3)], vectors=True, trace=[])
    asked = [
        (Summed(spec(), PoolingState(2, 5, 5), None, before), [2], [10.0, 20.0, -2]),
        (Summed(spec(end=5), PoolingState(0, 5, 5), None), [0], []),
        (Summed(one_layer, PoolingState(3, 5, 5), None), [3], [-3]),
        (Summed(spec(), PoolingState(1, 5, 5, drafts=range(4, 6)), None), [1, 4, 5], [-1]),
        (Summed(spec(vectors=False), PoolingState(3, 5, 5), None, before[:1]), [3], [10.0, -3]),
    ]
    taken = ReadoutFlow(buffers).take([summed for summed, _, _ in asked])
    for tensor in (*buffers.sums_L_AD, *buffers.last_L_AD):
        tensor.fill_(99)

    def row(number: float) -> np.ndarray:
        """The sum of accumulator ``number``, its last row if negative, or an earlier row from 10 on."""
        if number >= 10:
            return np.full((2, SIZE), number, np.float32)
        return rows_ALD[int(abs(number))] * (-1 if number < 0 else 1)

    for readout, (summed, sums, tail) in zip(taken, asked, strict=True):
        layers = summed.spec.layer_indices
        for got, projected, numbers in (
            (readout.sums_LND, readout.sums_PN, sums),
            (readout.tail_LMD, readout.tail_PM, tail),
        ):
            expected_NLD = np.array([row(number)[layers] for number in numbers]).reshape(-1, len(layers), SIZE)
            if summed.spec.vectors:
                assert got is not None
                np.testing.assert_array_equal(got.numpy(), expected_NLD.transpose(1, 0, 2))
            # float32 products of a few numbers up to 20
            np.testing.assert_allclose(projected.numpy(), (expected_NLD[:, -1] @ DIRECTION)[None], atol=1e-4)


@pytest.mark.parametrize(
    ("internal", "external", "index"),
    [
        ("7-8d3f", "7", 0),
        ("7", "7", 0),
        ("0_7-8d3f", "7", 0),
        ("12_7-8d3f", "7", 12),
        ("1_2-8d3f", "1_2", 0),
        ("3_1_2-8d3f", "1_2", 3),
        ("chat-x-1", "chat-x", 0),
    ],
)
def test_internal_ids_name_the_request_and_the_sample(internal: str, external: str, index: int) -> None:
    assert sample_key(internal, SimpleNamespace(request_id=external, key="unique")) == ("unique", index)  # type: ignore[arg-type]


def test_conditions_are_counted_where_their_entries_and_the_readout_are() -> None:
    """Columns behind those of the traced directions; what an entry did not write is an older step's, even NaN."""
    held = [Held(2, 1, [(3, 5), (6, None)]), Held(0, 0, [(0, None)]), Held(3, 0, [(4, None)], 2, 1.5, is_above=True)]
    asked = replace(spec(trace=True, vectors=False), first=2, held=held, num_held=4)
    trace = Trace(4)
    trace.reserve(5)
    nan = np.nan  # positions 2 to 6; the last one is a surplus token
    columns = [[0.0] * 5, [0.0] * 5, [nan, 1, 0, nan, 1], [1, 1, 0, 1, 1]]
    trace.write(0, np.array(columns, np.float32))
    taken = replace(finished(asked, tokens=5, trace=trace, kept=1), prompt_sums_G=torch.tensor([9.0, 9.0, 1.25, 9.0]))
    taken.state.next_position = 7
    assert taken.answer(7)["held"] == [4, None, 2, False]
    answer = taken.answer(6)
    assert answer["held"] == [3, None, 1, False]
    assert [name for name, _ in answer["trace"]] == ["kind", "cold"]
    assert replace(taken, prompt_sums_G=None).answer(7)["held"] == [4, None, 2, None]
    assert replace(taken, trace=Trace(4, "no column")).answer(7)["held"] == [None, None, None, False]
    assert replace(taken, spec=replace(asked, held=[], num_held=None)).answer(7)["held"] is None
