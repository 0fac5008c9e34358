"""Every implementation of the op against its loop, written out in float64. Those in Triton: test_triton_kernels.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ops.step_cases import (
    PROBES,
    REQUESTS,
    Case,
    Owner,
    check,
    loop,
    make_case,
    over_prompt,
    registered,
    with_blocks,
)
from vllm_steer.ops import cpu, reference, stream_range
from vllm_steer.ops.dispatch import connect, steer_and_read, why_not_native
from vllm_steer.ops.layer_tables import LayerTables
from vllm_steer.ops.native import build
from vllm_steer.plan import entry_rows, step_plan
from vllm_steer.plan.entry_rows import ABOVE, CLAMP, KEEP_NORM, PROBE, PROMPT, RELATIVE, STORED
from vllm_steer.plan.step_plan import READ, STEER, TRACE, VERSION

IMPLEMENTATIONS = {"reference": reference.steer_and_read, "cpu": cpu.steer_and_read, "registered": registered}
why_not_native()  # selects the implementation, as connecting does, for the tests that connect nothing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Callable[..., None]:
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_loop_for_every_layout_of_the_stream(
    implementation: Callable[..., None], dtype: torch.dtype, residual: bool, strided: bool
) -> None:
    for seed in range(3):
        check(make_case(seed, dtype=dtype, residual=residual, strided=strided), implementation)


@pytest.mark.parametrize("read", ["none", "some", "all"])
@pytest.mark.parametrize("steered", ["none", "some", "all"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("entries", [1, 4])
def test_agrees_with_the_loop_for_every_sparsity(
    implementation: Callable[..., None], tokens: int, entries: int, steered: str, read: str
) -> None:
    check(make_case(7, tokens=tokens, entries=entries, steered=steered, read=read), implementation)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_traces_the_steered_stream_and_leaves_unused_columns(
    implementation: Callable[..., None], dtype: torch.dtype, columns: int
) -> None:
    check(make_case(11, columns=columns, dtype=dtype), implementation)


@pytest.mark.parametrize("stored", [None, False, True], ids=["no room", "not asked for", "stored"])
@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steered", ["none", "some"])
def test_stores_the_steered_stream_of_every_token_where_rows_are_asked_for(
    implementation: Callable[..., None], steered: str, dtype: torch.dtype, residual: bool, stored: bool | None
) -> None:
    for seed, (read, columns) in enumerate([("none", 0), ("some", 2)]):
        check(
            make_case(
                seed, steered=steered, read=read, columns=columns, dtype=dtype, residual=residual, strided=True,
                stored=stored,
            ),
            implementation,
        )  # fmt: skip


def test_the_fast_path_leaves_the_trace_alone_where_no_token_of_the_step_is_traced() -> None:
    case = make_case(12, columns=3)
    case.flags[TRACE] = 0  # a column stays bound while its request waits
    before = case.trace.clone()
    cpu.steer_and_read(*case.args())
    assert torch.equal(case.trace, before)


def test_a_step_that_does_nothing_changes_no_bit(implementation: Callable[..., None]) -> None:
    case = make_case(3, steered="none", read="none", columns=0)
    case = replace(case, keep=torch.ones(REQUESTS, dtype=torch.int32))
    got = case.copy()
    implementation(*got.args())
    for before, after in zip(case.args(), got.args(), strict=True):
        assert torch.equal(before, after)


def test_later_entries_see_what_earlier_ones_did(implementation: Callable[..., None]) -> None:
    """add 5·d then ablate d leaves no d; ablate then add leaves exactly 5."""
    case = make_case(5, tokens=2, entries=2, steered="none", read="none", residual=False)
    case.row_of_token[:2] = torch.tensor([0, 1], dtype=torch.int32)
    case.entry_slot[:2], case.entry_mode[:2] = 3, 0
    case.entry_ab[0] = torch.tensor([[5.0, 0.0], [0.0, -1.0]])
    case.entry_ab[1] = torch.tensor([[0.0, -1.0], [5.0, 0.0]])
    case.flags[STEER] = 2
    implementation(*case.args())
    # float32 products of unit vectors: 1e-6; the wrong order would give 5 and 0
    torch.testing.assert_close(case.hidden @ case.bank[3], torch.tensor([0.0, 5.0]), rtol=0, atol=5e-6)


@pytest.mark.parametrize("tokens", [9, 170])
@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_of_every_mode_agree_with_the_loop(
    implementation: Callable[..., None], dtype: torch.dtype, residual: bool, tokens: int
) -> None:
    for seed in range(6):
        shape: dict[str, Any] = {"tokens": tokens, "columns": 3 * (seed % 2)}
        case = make_case(seed, entries=4, steered="all", dtype=dtype, residual=residual, modes=True, **shape)
        if tokens == 170:  # long runs
            case.row_of_token[:] = 3
            case.row_of_token[90:] = 4
        check(case, implementation, scale=4)  # what one entry has rounded, later ones multiply


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [ABOVE, ABOVE | KEEP_NORM, ABOVE | STORED, ABOVE | PROMPT, PROBE])
def test_a_token_on_which_no_condition_holds_stays_equal_bit_for_bit(
    implementation: Callable[..., None], dtype: torch.dtype, mode: int
) -> None:
    case = make_case(8, tokens=17, steered="all", dtype=dtype)
    case.entry_mode[:], case.entry_gate[:], case.entry_threshold[:] = mode, 1, torch.inf
    before = case.copy()
    implementation(*case.args())
    assert torch.equal(case.hidden, before.hidden)


@pytest.mark.parametrize("count", [1, 40])
def test_a_condition_over_the_prompt_sums_the_part_of_this_step_and_those_before(
    implementation: Callable[..., None], count: int
) -> None:
    case = over_prompt(count)
    check(case, implementation)
    run = case.copy()
    implementation(*run.args())
    # twice of three times 5·d; the entry that fails would make it three times
    moved = (run.hidden - case.hidden)[count] @ case.bank[1]
    torch.testing.assert_close(moved, torch.tensor(10.0), rtol=0, atol=1e-4)


def test_a_nan_in_one_prompt_leaves_the_conditions_over_others_alone(implementation: Callable[..., None]) -> None:
    case = over_prompt(6)
    case.prompt_part[1] = torch.tensor([6, 1])
    case.probe[6, :], case.prompt_sums[3] = torch.nan, torch.nan
    moved = case.copy()
    implementation(*moved.args())
    torch.testing.assert_close((moved.hidden - case.hidden)[6] @ case.bank[1], torch.tensor(10.0), rtol=0, atol=1e-4)
    case.entry_gate[0, 0] = 1 * PROBES + 3  # its own NaN holds nowhere
    moved = case.copy()
    implementation(*moved.args())
    torch.testing.assert_close((moved.hidden - case.hidden)[6] @ case.bank[1], torch.tensor(5.0), rtol=0, atol=1e-4)


def test_a_stream_of_nothing_has_no_length_to_keep(implementation: Callable[..., None]) -> None:
    """Zeros stay zeros, not NaN: where the length is kept, by an entry that leaves nothing, between open bounds."""
    case = make_case(6, tokens=3, entries=1, steered="none", read="none", residual=False)
    case.row_of_token[:3] = torch.tensor([0, 1, 2], dtype=torch.int32)
    case.entry_slot[:3], case.entry_mode[:3, 0] = 3, torch.tensor([KEEP_NORM, KEEP_NORM, CLAMP | RELATIVE])
    case.entry_ab[:3] = torch.tensor([[[5.0, 0.0]], [[0.0, -1.0]], [[-torch.inf, 1.0]]])
    case.bank[3] = torch.eye(len(case.bank[3]))[0]
    case.flags[STEER] = 1
    case.hidden[:], case.hidden[1] = 0.0, 7 * case.bank[3]
    implementation(*case.args())
    assert not case.hidden.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_accumulator_that_is_reset_forgets_even_nan_and_inf(implementation: Callable[..., None], bad: float) -> None:
    case = make_case(2, read="all")
    case.segment[:] = torch.tensor([[0, 0], [0, 9], [0, 0], [0, 0]])
    case.keep[:] = torch.tensor([1, 0, 0, 1])  # one with a segment, one without: its drafts are added later
    case.sums[1:3] = bad
    implementation(*case.args())
    assert case.sums[1].isfinite().all()
    assert not case.sums[2].any()


def test_one_request_s_nan_stays_in_its_own_tokens_and_sums(implementation: Callable[..., None]) -> None:
    case = make_case(4, tokens=4, steered="all", read="all", residual=False)
    case.row_of_token[:4] = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    case.segment[:] = torch.tensor([[0, 2], [2, 2], [0, 0], [0, 0]])
    case.hidden[:2] = float("nan")
    implementation(*case.args())
    assert case.hidden[2:].isfinite().all()
    assert case.sums[1:].isfinite().all()
    assert case.last[1:].isfinite().all()
    assert case.sums[0].isnan().all()


@pytest.mark.parametrize("op", ["add", "set"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_runs_and_segments_agree_with_the_loop(
    implementation: Callable[..., None], dtype: torch.dtype, op: str
) -> None:
    """As in a prompt: many tokens share a row and an accumulator, and an unsteered token lies between two runs."""
    case = make_case(21, tokens=170, dtype=dtype)
    case.row_of_token[:170] = 3
    case.row_of_token[35] = -1
    case.row_of_token[130:170] = 4
    case.entry_ab[..., 1] = 0.0 if op == "add" else -1.0
    case.entry_ab[case.entry_slot < 0] = 0.0
    case.segment[:] = torch.tensor([[0, 0], [70, 100], [0, 69], [0, 0]])
    case.flags[READ] = len(case.segment)
    check(case, implementation)


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_summed_beside_the_requests_that_they_are_of(
    implementation: Callable[..., None], dtype: torch.dtype, size: int
) -> None:
    for seed, tokens in ((51, 9), (52, 170)):
        case = make_case(seed, tokens=tokens, dtype=dtype)
        assert case.segment[:, 1].any()
        check(with_blocks(case, size), implementation)


LARGEST = 65504.0  # of float16


@pytest.mark.parametrize("residual", [False, True], ids=["hidden only", "with residual"])
@pytest.mark.parametrize("op", ["add", "set"])
@pytest.mark.parametrize("alpha", [1e3, 7e4, -3e5, 1e30])
def test_nothing_that_steering_writes_into_a_float16_stream_is_infinite(
    implementation: Callable[..., None], alpha: float, op: str, residual: bool
) -> None:
    """For every α the outputs and the next layer's sum stay finite, and rows that were cut off are marked."""
    for seed, tokens in ((41, 9), (42, 170)):
        # One entry: two that cancel out would leave a remainder in float32, but not in float64.
        case = make_case(seed, tokens=tokens, entries=1, steered="all", dtype=torch.float16, residual=residual)
        case.entry_ab[:4, :, 0] = alpha  # the other rows stay as they are
        case.entry_ab[..., 1] = 0.0 if op == "add" else -1.0
        if residual:
            assert case.residual is not None
            case.residual[::2] = -LARGEST  # so that hidden can leave the range where the stream does not
            case.hidden[::2] = LARGEST / 2
        check(case, implementation, scale=min(abs(alpha), LARGEST) / 8)
        run = case.copy()
        implementation(*run.args())
        handed_on = run.hidden if run.residual is None else run.hidden + run.residual  # in float16, as vLLM adds
        assert run.hidden.isfinite().all()
        assert handed_on.isfinite().all()
        used = set(case.row_of_token[:tokens].tolist())
        assert set(run.cut.nonzero()[:, 0].tolist()) <= used
        if abs(alpha) > 4 * LARGEST:  # a unit vector of 24 elements has one above a fifth
            steered = {row for row in used if row < 4 and case.entry_slot[row, 0] >= 0}
            assert steered, "no row was to be cut off"
            assert steered <= set(run.cut.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("own", [float("nan"), 60_000.0, -65_504.0])
def test_what_the_model_itself_brings_beyond_the_limit_is_not_made_worse(
    implementation: Callable[..., None], own: float
) -> None:
    case = make_case(43, tokens=2, entries=1, steered="none", read="none", dtype=torch.float16, residual=False)
    case.row_of_token[:2] = torch.tensor([0, 1], dtype=torch.int32)
    case.entry_slot[:2], case.entry_mode[:2] = 3, 0
    case.bank[3] = torch.eye(len(case.bank[3]))[0]
    case.entry_ab[:2] = torch.tensor([[[100.0, 0.0]], [[-100.0, 0.0]]])
    case.flags[STEER] = 1
    case.hidden[:, 0] = own
    implementation(*case.args())
    up, down = case.hidden[:, 0].float().tolist()
    if own != own:
        assert up != up
        assert down != down
    else:
        # towards zero it moves as it would anywhere (float16 has steps of 32 here), away from zero it does not move
        assert (up, down) == ((own, own - 100 + 4) if own > 0 else (own + 100 - 4, own))
    is_cut = [own == 60_000.0, own == -65_504.0]
    assert case.cut[:2].bool().tolist() == is_cut


@pytest.mark.parametrize("most", [1, 2, 40])
@pytest.mark.parametrize("op", ["add", "set"])
def test_the_fast_path_in_parts_agrees_with_the_loop(op: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are processed in parts: runs, segments and gaps cross the borders, and some segments end on one."""
    for seed, tokens in ((31, 9), (32, 170)):
        case = make_case(seed, tokens=tokens, steered="all" if seed == 31 else "some", columns=2)
        if tokens == 170:  # long runs and segments, of which one ends where a part of 40 does
            case.row_of_token[:170] = 3
            case.row_of_token[35] = -1
            case.segment[:] = torch.tensor([[0, 0], [70, 80], [0, 70], [0, 0]])
        if op == "add":
            case.entry_ab[..., 1] = 0.0
        monkeypatch.setattr(cpu, "PART", most * case.hidden.shape[1])
        check(case, cpu.steer_and_read)


def test_the_fast_path_forgets_nothing_that_changes_between_calls() -> None:
    """Nothing is cached for tables without a version: changed scalars, slots, rows or segments take effect."""
    case = make_case(33, entries=1, steered="all", read="all")
    check(case, cpu.steer_and_read)
    case.entry_ab[..., 0] *= -1.5
    check(case, cpu.steer_and_read)
    case.entry_slot[:], case.entry_mode[:] = (case.entry_slot + 1) % len(case.bank), 0
    check(case, cpu.steer_and_read)
    case.row_of_token[:] = case.row_of_token.flip(0)
    case.bank.mul_(0.5)
    check(case, cpu.steer_and_read)
    case.segment[:] = case.segment.flip(0)
    check(case, cpu.steer_and_read)


def test_the_fast_path_adds_the_directions_that_are_in_the_bank_now() -> None:
    """The additions are cached by the tables' version, and yet a rewritten direction takes effect."""
    case = make_case(21, steered="all", read="none")
    case.entry_ab[..., 1] = 0.0  # nothing but additions, whose sum does not depend on the token
    case.flags[VERSION] = 1

    def check_added(case: Case) -> None:
        hidden = case.hidden.clone()
        cpu.steer_and_read(hidden, *case.args()[1:])
        np.testing.assert_allclose(hidden.double().numpy(), loop(case).hidden, atol=2e-5)  # as in check

    with torch.inference_mode():  # as vLLM's workers run
        check_added(case)
        case.bank.neg_()
        check_added(case)


def test_the_fast_path_looks_at_tables_once_for_each_version_and_number_of_tokens() -> None:
    case = make_case(34, tokens=9, steered="all", read="all")
    case.entry_ab[..., 1] = 0.0
    others = replace(case, entry_ab=-2 * case.entry_ab, segment=case.segment.flip(0))  # at the same flags
    case.flags[VERSION] = 5

    def added(case: Case, tokens: int) -> torch.Tensor:
        run = replace(case, sums=torch.zeros_like(case.sums), hidden=case.hidden[:tokens].clone())
        cpu.steer_and_read(run.hidden, None, *run.args()[2:])
        return torch.cat([run.hidden, run.sums])

    whole, part = added(case, 9), added(replace(case, segment=torch.zeros_like(case.segment)), 5)
    assert torch.equal(part[:5], whole[:5])
    case.flags[VERSION] = 6
    assert torch.equal(added(case, 9), whole)
    assert torch.equal(added(others, 9), whole), "tables of one version were looked at twice"
    case.flags[VERSION] = 7
    assert not torch.equal(added(others, 9), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_path_and_specification_round_alike(dtype: torch.dtype) -> None:
    # One entry of op add per row: a product and an addition, but no dot product, whose order is free.
    case = make_case(8, entries=1, steered="all", dtype=dtype)
    case.entry_ab[..., 1] = 0
    ours, theirs = case.copy(), case.copy()
    cpu.steer_and_read(*ours.args())
    reference.steer_and_read(*theirs.args())
    eps = torch.finfo(dtype).eps
    # addcmul may fuse the product into the addition: one float32 ulp before the one rounding, so at most one of dtype
    torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("residual", [False, True])
def test_the_schema_is_what_the_compiler_can_work_with(residual: bool) -> None:
    """With idle flags, since the checks copy them, and the op finds its tables by where they lie."""
    case = make_case(1, residual=residual)
    args = (case.hidden, case.residual, torch.zeros_like(case.flags))
    torch.library.opcheck(
        steer_and_read, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_a_cpu_runs_the_compiled_op() -> None:
    assert why_not_native() is None


@pytest.mark.parametrize(
    ("variables", "why"),
    [({"VLLM_STEER_NATIVE": "0"}, "VLLM_STEER_NATIVE=0"), ({"CXX": "no-such-compiler"}, "no-such-compiler")],
)
def test_without_a_compiled_op_the_one_in_python_runs_and_the_reason_is_known(
    variables: dict[str, str], why: str
) -> None:
    code = (
        "from tests.ops.step_cases import check, make_case, registered\n"
        "from vllm_steer.ops.dispatch import why_not_native\n"
        "check(make_case(3, steered='all', read='all', columns=2), registered)\n"
        "print(why_not_native())"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert why in ran.stdout


def test_flags_of_no_connected_layer_are_refused() -> None:
    case = make_case(1, steered="all")
    with pytest.raises(RuntimeError, match="no connected layer"):
        steer_and_read(case.hidden, case.residual, case.flags.clone())


def test_tables_are_found_for_as_long_as_their_owner_lives() -> None:
    case = make_case(1, steered="all")
    before, owner = case.hidden.clone(), Owner()
    connect(owner, [LayerTables(*case.args()[2:])])
    steer_and_read(case.hidden, case.residual, case.flags)
    assert not torch.equal(case.hidden, before)
    del owner
    with pytest.raises(RuntimeError, match="no connected layer"):
        steer_and_read(case.hidden, case.residual, case.flags)


def test_the_stream_may_have_any_strides_and_residual_a_type_of_its_own() -> None:
    case = make_case(14, steered="all", read="all", columns=2, stored=True)
    for dtype in DTYPES:
        wide = torch.zeros(9, 2 * case.hidden.shape[1]).to(torch.bfloat16)
        one = replace(case, hidden=wide[:, ::2].copy_(case.hidden), residual=case.residual.to(dtype))
        check(one, registered)


@pytest.mark.parametrize("dimension", [576, 3584])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference_at_the_sizes_of_models_with_any_number_of_threads(
    dtype: torch.dtype, dimension: int
) -> None:
    case = make_case(13, tokens=300, entries=8, columns=3, dimension=dimension, dtype=dtype, modes=True, stored=True)
    expected, once, twice = case.copy(), case.copy(), case.copy()
    reference.steer_and_read(*expected.args())
    threads = torch.get_num_threads()
    try:
        for one, number in ((once, 1), (twice, 4)):
            torch.set_num_threads(number)
            registered(*one.args())
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(once.args(), twice.args(), strict=True):
        np.testing.assert_array_equal(one.float().numpy(), other.float().numpy())
    eps = torch.finfo(dtype).eps
    # Later of 8 entries multiply by up to 2 what earlier ones have rounded, and eps is one rounding of hidden.
    torch.testing.assert_close(once.hidden, expected.hidden, rtol=4 * eps, atol=1e-3)
    # Up to 300 rows, each off by at most one rounding of hidden: 300 · 4 · eps at the very most.
    torch.testing.assert_close(once.sums, expected.sums, rtol=1e-4, atol=300 * 4 * eps)


def test_the_constants_of_the_source_are_those_of_the_plan() -> None:
    source = (Path(build.__file__).parent / "steer_and_read.cpp").read_text()
    numbers = {name: float(value) for name, value in re.findall(r"\b([A-Z][A-Z0-9_]+) = ([\d.]+)", source)}
    named = {name for name in numbers if hasattr(entry_rows, name) or hasattr(step_plan, name)} | {"FLOAT16_LIMIT"}
    assert len(named) == 15
    for name in named:
        home = next(one for one in (entry_rows, step_plan, stream_range) if hasattr(one, name))
        assert numbers[name] == getattr(home, name), name
