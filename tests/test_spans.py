"""Spans, against Python's own slices of lists of positions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.span_reference import positions
from vllm_steer import spans
from vllm_steer.errors import BadReadout, BadSpan

LONG = 60  # positions that the comparison looks at; every bound drawn here lies well before it


@st.composite
def parts(draw: st.DrawFn) -> str:
    base = draw(st.sampled_from(["prompt", "generated", "response", "all"]))
    bounds = st.integers(-12 if base == "prompt" else 0, 12)
    form = draw(st.sampled_from(["whole", "index", "slice"]))
    if form == "whole":
        return base
    if form == "index":
        return f"{base}[{draw(bounds)}]"
    start, stop = draw(st.none() | bounds), draw(st.none() | bounds)
    return f"{base}[{'' if start is None else start}:{'' if stop is None else stop}]"


def held(runs: list[spans.Run]) -> set[int]:
    return {one for first, end in runs for one in range(first, LONG if end is None else end)}


@given(st.lists(parts(), min_size=1, max_size=4), st.integers(1, 20))
def test_a_span_holds_what_pythons_slices_hold(own: list[str], prompt_len: int) -> None:
    expected = [positions(part, prompt_len, LONG) for part in own]
    span = " + ".join(own)
    if not all(expected):
        with pytest.raises(BadSpan, match="allowed"):
            spans.runs(span, prompt_len)
        return
    spans.check(span)
    found = spans.runs(span, prompt_len)
    assert held(found) == set().union(*expected)
    bounds = [bound for run in found for bound in run]
    assert all(one is not None and (two is None or one < two) for one, two in pairwise(bounds))


@given(st.lists(parts(), min_size=1, max_size=3), st.integers(1, 20))
def test_check_refuses_only_what_is_empty_for_every_prompt(own: list[str], prompt_len: int) -> None:
    try:
        spans.check("+".join(own))
    except BadSpan:
        assert not all(positions(part, prompt_len, LONG) for part in own)


@given(st.lists(parts(), max_size=4), st.integers(1, 20))
def test_the_same_spans_apply_throughout_a_window_and_not_in_the_next(own: list[str], prompt_len: int) -> None:
    expected = [positions(part, prompt_len, LONG) for part in own]
    if not all(expected):
        return
    found = spans.windows(own, prompt_len)
    assert found[0][0] == 0
    ends = [*(start for start, _ in found[1:]), LONG]
    for (start, numbers), end in zip(found, ends, strict=True):
        for position in range(start, end):
            assert numbers == [number for number, held in enumerate(expected) if position in held]
    assert all(one[1] != two[1] for one, two in pairwise(found))


@pytest.mark.parametrize(
    "span",
    [
        *(
            "",
            "decode",
            "prompt[",
            "prompt[]",
            "prompt[::2]",
            "prompt[1:2:3]",
            "response[",
            "prompt+",
            "+",
            "all[0x1]",
        ),
        *(
            "prompt[1.5]",
            "prompt[1_0]",
            "Prompt",
            "prompt prompt",
            "prompt[1234567890]",
            "+".join(["all"] * 17),
            3,
            None,
        ),
        *(
            "generated[-1]",
            "response[-1]",
            "response[:0]",
            "all[-5:]",
            "generated[:0]",
            "prompt[-1:-3]",
            "all[4:4]",
            "prompt[:0]",
        ),
    ],
)
def test_what_is_no_span_or_always_empty_is_refused(span: object) -> None:
    with pytest.raises(BadSpan, match="allowed") as caught:
        spans.check(span)
    assert len(str(caught.value)) < 400


def test_a_slice_is_clipped_as_in_python_and_an_index_is_not() -> None:
    assert spans.runs("prompt[-5:]", 3) == [(0, 3)]
    assert spans.runs("prompt[5:-3]", 9) == [(5, 6)]
    assert spans.runs("prompt[-5:3]", 4) == [(0, 3)]
    spans.check("prompt[5:-3] + prompt[-5:3]")
    for empty in ("prompt[-5]", "prompt[5:-3]"):
        with pytest.raises(BadSpan, match="holds no token of a prompt of 3 tokens"):
            spans.runs(empty, 3)


def test_a_slice_behind_the_last_computed_token_is_found() -> None:
    assert spans.beyond("prompt+generated[3:]", 5, 8) == "generated[3:]"
    assert spans.beyond("prompt+generated[2:]", 5, 8) is None
    assert spans.beyond("all[9]", 5, 8) == "all[9]"
    assert spans.beyond("generated", 5, 5) is None  # the whole of it may be empty, as it always could


def test_a_readout_is_one_run_that_ends_in_the_prompt_or_never() -> None:
    assert spans.read_run("all", 2, 5) == (2, None)
    assert spans.read_run("response", 0, 5) == (4, None)
    assert spans.read_run("prompt[-3:]", 0, 5) == (2, 5)
    assert spans.read_run("prompt[2:]+generated", 0, 5) == (2, None)
    assert spans.read_run("all[1:4]", 0, 5) == (1, 4)
    for span in ("prompt[0]+generated", "generated[:2]", "all[1:6]"):
        with pytest.raises(BadReadout, match="allowed: one run of tokens"):
            spans.read_run(span, 0, 5)
