"""The Triton kernels against the op's loop and against ``reference``, on a GPU or in Triton's interpreter.

test_triton_kernels.py runs this in its own process, since Triton decides at import whether it interprets. The device is
CUDA where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops.step_cases import Case, check, make_case, over_prompt, registered, with_blocks
from tests.support.plans import in_halves
from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.ops import reference, triton_kernels
from vllm_steer.ops.layer_tables import tables_at
from vllm_steer.ops.triton_kernels import FEW, FEW_TOKENS, MANY, steer_and_read
from vllm_steer.plan.batch_plan import BatchPlanner, Pooling, RequestPlan
from vllm_steer.plan.entry_rows import Entry

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter truncates a float32 where a GPU rounds it to the nearest bfloat16: a whole unit, not half of one.
ROUNDING = {dtype: 1.01 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.51 for dtype in DTYPES}


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_loop_for_every_layout_of_the_stream(dtype: torch.dtype, residual: bool, strided: bool) -> None:
    case = make_case(1, columns=3, dtype=dtype, residual=residual, strided=strided)
    check(case, steer_and_read, DEVICE, rounding=ROUNDING[dtype])


@pytest.mark.parametrize("read", ["none", "some", "all"])
@pytest.mark.parametrize("steered", ["none", "some", "all"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_agrees_with_the_loop_for_every_sparsity(tokens: int, steered: str, read: str) -> None:
    check(make_case(7, tokens=tokens, entries=4, steered=steered, read=read), steer_and_read, DEVICE)


@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_of_every_mode_agree_with_the_loop(dtype: torch.dtype, residual: bool) -> None:
    for seed in range(6):
        shape: dict[str, Any] = {"columns": 3 * (seed % 2)}
        case = make_case(seed, entries=4, steered="all", dtype=dtype, residual=residual, modes=True, **shape)
        check(case, steer_and_read, DEVICE, rounding=ROUNDING[dtype], scale=4)


@pytest.mark.parametrize("stored", [None, False, True], ids=["no room", "not asked for", "stored"])
@pytest.mark.parametrize("steered", ["none", "some"])
def test_stores_the_steered_stream_of_every_token_where_rows_are_asked_for(steered: str, stored: bool | None) -> None:
    for seed, dtype in enumerate(DTYPES):
        for read, columns, residual in (("none", 0, True), ("some", 2, False)):
            case = make_case(
                seed, steered=steered, read=read, columns=columns, dtype=dtype, residual=residual, strided=True,
                stored=stored,
            )  # fmt: skip
            check(case, steer_and_read, DEVICE, rounding=ROUNDING[dtype])


@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("alpha", [1e3, -3e5])
def test_a_float16_stream_is_cut_off_at_its_limit_and_the_row_says_so(alpha: float, residual: bool) -> None:
    case = make_case(41, entries=1, steered="all", dtype=torch.float16, residual=residual)
    case.entry_ab[:4, :, 0] = alpha
    if case.residual is not None:
        case.residual[::2] = -65504.0
        case.hidden[::2] = 32752.0
    check(case, steer_and_read, DEVICE, scale=abs(alpha) / 8)
    run = case.copy(DEVICE)
    steer_and_read(*run.args())
    assert run.hidden.isfinite().all()
    assert run.cut.any() or abs(alpha) < 65504.0


@pytest.mark.parametrize("dimension", [1, FEW.block_d, 576])
def test_any_size_of_the_stream_will_do(dimension: int) -> None:
    # Normalised vectors of one element are ±1, and so is every direction: the tolerances stay the same.
    check(make_case(3, dimension=dimension, columns=2, dtype=torch.float16), steer_and_read, DEVICE)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_blocks_are_summed_beside_the_requests_that_they_are_of(size: int) -> None:
    for seed, tokens in ((51, 9), (52, 170)):
        check(with_blocks(make_case(seed, tokens=tokens), size), steer_and_read, DEVICE)


# Segments that are longer than two blocks of tokens, in a small call and in a large one.
LONG = pytest.mark.parametrize("tokens", [2 * FEW.block_t + 3, FEW_TOKENS + MANY.block_t + 3])


@LONG
def test_a_segment_longer_than_a_block_of_tokens(tokens: int) -> None:
    case = make_case(5, tokens=tokens)
    case.segment[:] = torch.tensor([[0, 1], [1, 0], [2, tokens - 2], [1, 1]])
    check(case, steer_and_read, DEVICE)


@pytest.mark.parametrize("count", [1, 256, 600])
def test_a_part_of_a_prompt_longer_than_a_block_is_summed_once(count: int) -> None:
    check(over_prompt(count), steer_and_read, DEVICE)


def test_a_stream_whose_elements_are_apart() -> None:
    case = make_case(6, columns=2)
    apart = replace(case, hidden=torch.stack([case.hidden, case.hidden], dim=2)[..., 0])
    assert apart.copy(DEVICE).hidden.stride(1) == 2
    check(apart, steer_and_read, DEVICE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_accumulator_that_is_reset_forgets_even_nan_and_inf(bad: float) -> None:
    case = make_case(2, read="all")
    case.segment[:] = torch.tensor([[0, 0], [0, 9], [0, 0], [0, 0]])
    case.keep[:] = torch.tensor([1, 0, 0, 1])
    case.sums[1:3] = bad
    check(case, steer_and_read, DEVICE)


def test_nobody_s_nan_reaches_another_s_tokens_or_sums() -> None:
    case = make_case(4, tokens=4, steered="all", read="all", residual=False)
    case.segment[:] = torch.tensor([[0, 2], [2, 2], [0, 0], [0, 0]])
    case.hidden[:2] = torch.nan
    on_device = case.copy(DEVICE)
    steer_and_read(*on_device.args())
    assert on_device.hidden[2:].isfinite().all()
    assert on_device.sums[1:].isfinite().all()
    assert on_device.sums[0].isnan().all()


def test_flags_that_say_nothing_is_there_leave_everything_as_it_is() -> None:
    case = make_case(9, steered="all", read="all", columns=3)
    case.flags.zero_()
    got = case.copy(DEVICE)
    steer_and_read(*got.args())
    for before, after in zip(case.args(), got.args(), strict=True):
        assert torch.equal(before, after.cpu())


@LONG
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_have_one_order(dtype: torch.dtype, tokens: int) -> None:
    """A sum is the same bit for bit, whatever other accumulators there are and however often it is repeated."""
    case = make_case(5, tokens=tokens, dtype=dtype)
    case.segment[:] = torch.tensor([[0, 0], [0, tokens], [0, 0], [0, 0]])
    case.keep[:] = 0
    first, again = case.copy(DEVICE), case.copy(DEVICE)
    again.segment.copy_(torch.tensor([[0, 0], [0, 0], [0, 0], [0, tokens]]))
    steer_and_read(*first.args())
    steer_and_read(*again.args())
    assert torch.equal(first.sums[1], again.sums[3])


def same(got: Case, expected: Case) -> None:
    eps = torch.finfo(got.hidden.dtype).eps
    # Two float32 computations of the same numbers, in another order, rounded once: at most one unit of hidden's type.
    torch.testing.assert_close(got.hidden, expected.hidden, rtol=eps, atol=2e-5)
    # Sums of at most 17 rows that may differ by that rounding; a token more or less errs by about 1.
    for name in ("sums", "last", "trace", "rows"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=2 * eps, atol=20 * eps + 1e-4)


class Launches:
    """Wraps a kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.count += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """A function that tells how often each kernel was launched since its last call."""
    counting = [Launches(getattr(triton_kernels, name)) for name in ("_steer_and_trace", "_read")]
    for one, name in zip(counting, ("_steer_and_trace", "_read"), strict=True):
        monkeypatch.setattr(triton_kernels, name, one)

    def since() -> tuple[int, int]:
        steered, read = (one.count for one in counting)
        for one in counting:
            one.count = 0
        return steered, read

    return since


def hook_of() -> tuple[SteerBuffers, Callable[[], None]]:
    """Buffers with two hooked layers, and a call at the first one over four tokens."""
    buffers = SteerBuffers(
        num_layers=2, hidden_size=24, max_tokens=8, max_requests=2, max_entries=1, max_directions=1, trace_columns=1,
        device=torch.device(DEVICE), has_rows=True,
    )  # fmt: skip
    stream, tables = torch.ones(4, 24, device=DEVICE), tables_at(buffers.flags_L4[0])
    return buffers, lambda: steer_and_read(stream, stream, *tables)


ENTRY = Entry(0, 0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("request_plan", "expected"),
    [
        (in_halves(4), (0, 0)),
        (in_halves(4, (ENTRY,), (ENTRY,)), (1, 0)),
        (in_halves(4, pooling=Pooling((0,), 0, None)), (0, 1)),
        (in_halves(4, pooling=Pooling((0,), 0, None, trace=((0, 0),))), (1, 1)),
        (in_halves(4, pooling=Pooling((0,), 0, None, stores_rows=True)), (1, 0)),
        (in_halves(4, (Entry(1, 0, 1.0, 0.0),), (), Pooling((1,), 0, None)), (0, 0)),
    ],
    ids=["nothing", "steering", "reading", "tracing", "storing", "another layer"],
)  # fmt: skip
def test_a_step_launches_only_what_it_asks_of_the_layer(
    request_plan: RequestPlan, expected: tuple[int, int], launches: Callable[[], tuple[int, int]]
) -> None:
    planner = BatchPlanner(2, 2, 1, 1)
    buffers, call = hook_of()
    call()
    assert launches() == (1, 1), "before the first step kernels are compiled"
    planner.add("a", request_plan)
    buffers.write(planner.build(["a"], [0], [4]))
    call()
    assert launches() == expected
    buffers.silence()
    call()
    assert launches() == (1, 1), "a pass that no request stands behind may be there to compile kernels"
    planner.remove("a")
    buffers.write(planner.build(["b"], [0], [4]))
    call()
    assert launches() == (0, 0)


@pytest.mark.gpu
def test_a_captured_graph_holds_both_kernels_though_the_step_asks_for_neither(
    launches: Callable[[], tuple[int, int]],
) -> None:
    planner = BatchPlanner(2, 2, 1, 1)
    buffers, call = hook_of()
    call()
    buffers.write(planner.build(["b"], [0], [4]))
    launches()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()
    assert launches() == (1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_graph_does_what_the_tables_say_when_it_is_replayed(dtype: torch.dtype) -> None:
    case = make_case(0, tokens=17, steered="none", read="none", columns=3, dtype=dtype, stored=False).copy(DEVICE)
    steer_and_read(*case.args())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steer_and_read(*case.args())
    for seed in (1, 2, 3):
        new = make_case(seed, tokens=17, columns=3, dtype=dtype, stored=seed != 2)
        for old, value in zip(case.args(), new.args(), strict=True):
            old.copy_(value)
        expected = case.copy(DEVICE)
        graph.replay()
        reference.steer_and_read(*expected.args())
        same(case, expected)
    case.flags.zero_()  # and back to a step that touches nothing
    before = case.copy(DEVICE)
    graph.replay()
    for one, other in zip(case.args(), before.args(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dimension", [576, 3584, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference_at_the_sizes_of_models(dtype: torch.dtype, dimension: int) -> None:
    case = make_case(13, tokens=300, entries=8, columns=3, dimension=dimension, dtype=dtype)
    got, expected = case.copy(DEVICE), case.copy(DEVICE)
    steer_and_read(*got.args())
    reference.steer_and_read(*expected.args())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.hidden, expected.hidden, rtol=eps, atol=1e-4)
    # Up to 300 rows, each off by at most one rounding of hidden: 300 · 4 · eps at the very most.
    torch.testing.assert_close(got.sums, expected.sums, rtol=1e-5, atol=300 * 4 * eps)


@pytest.mark.gpu
def test_the_registered_op_runs_the_kernels() -> None:
    check(make_case(1, columns=3), registered, DEVICE)
