"""Spans: the token positions of a request that an entry of steering or a readout covers.

A span is a part, or several joined by ``+``:

===========================  ======================================================================
part                         positions, with P prompt tokens
===========================  ======================================================================
``prompt``                   0 to P − 1
``generated``                from P on. The first generated token comes from the last prompt token, which
                             is not in this span
``response``                 from P − 1 on: the last prompt token and everything generated
``all``                      from 0 on
``prompt[-5:]``, ``all[3]``  a slice or one position of any of these, by Python's rules without a step. Only
                             those of ``prompt`` may be negative. ``response[:8]`` are the tokens from which
                             the first 8 generated ones come
===========================  ======================================================================

The model never computes the last generated token, so no span reaches it. A part without any token is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from vllm_steer.errors import BadReadout, BadSpan
from vllm_steer.messages import shown

Run = tuple[int, int | None]
"""Positions [first, end); ``end`` is None for a run that does not end."""

LONG_PROMPT = 1 << 40
"""Tokens of a prompt that is longer than any bound of a slice."""
_MOST_PARTS = 16
_PART = re.compile(r"(prompt|generated|response|all)(?:\[(?:(-?\d{1,9})|(-?\d{1,9})?:(-?\d{1,9})?)\])?")
_ALLOWED = (
    "prompt, generated, response, all, slices such as prompt[-5:], response[:8] or all[3], and sums of these with +"
)


class _Part(NamedTuple):
    """One part of a span; ``slice`` is None for the whole of ``base``."""

    text: str
    base: str
    slice: slice | None

    def run(self, prompt_len: int) -> Run | None:
        """Its positions; None if it has none."""
        if self.base == "prompt":
            first, end, _ = (self.slice or slice(None)).indices(prompt_len)
            return (first, end) if first < end else None
        start = {"generated": prompt_len, "response": max(prompt_len - 1, 0), "all": 0}[self.base]
        if self.slice is None:
            return start, None
        first, stop = self.slice.start or 0, self.slice.stop
        if stop is None:
            return start + first, None
        return (start + first, start + stop) if first < stop else None


def check(span: object) -> None:
    """Check a span as far as that is possible without the prompt.

    Raises:
        BadSpan: it is no span, or has a part that is empty for every prompt.
    """
    if not isinstance(span, str):
        raise _no_span(span)
    _check(span)


@lru_cache(maxsize=256)
def _check(span: str) -> None:
    parts = _parts(span)
    if parts is None:
        raise _no_span(span)
    for part in parts:
        _check_signs(part)
        # prompt[5:-3] holds tokens of long prompts alone, prompt[-5:3] of short ones.
        if part.run(LONG_PROMPT) is None and part.run(1) is None:
            raise _empty(part, "of any prompt" if part.base == "prompt" else "at all")


def _no_span(span: object) -> BadSpan:
    return BadSpan(f"span is {shown(span)}; allowed: {_ALLOWED}. Name the tokens to act on with one of them.")


def runs(span: str, prompt_len: int) -> list[Run]:
    """The positions of a span: runs that neither touch nor overlap, in order.

    Args:
        span: a span that ``check`` has passed.
        prompt_len: P.

    Raises:
        BadSpan: a part of it has no token with this prompt.
    """
    found: list[Run] = []
    parts = _parts(span)
    assert parts is not None
    for part in parts:
        run = part.run(prompt_len)
        if run is None:
            raise _empty(part, f"of a prompt of {prompt_len}")
        found.append(run)
    merged: list[Run] = []
    for first, end in sorted(found, key=lambda run: run[0]):
        if merged and ((last := merged[-1][1]) is None or first <= last):
            merged[-1] = merged[-1][0], None if last is None or end is None else max(last, end)
        else:
            merged.append((first, end))
    return merged


def windows(spans: Sequence[str], prompt_len: int) -> list[tuple[int, list[int]]]:
    """Cut a request into windows, at all of whose tokens the same of ``spans`` apply.

    Returns:
        (first position, numbers of the spans that apply there) of each window; the first one begins at 0, each ends
        where the next begins, and neighbours differ.

    Raises:
        BadSpan: as ``runs``.
    """
    positions = {span: runs(span, prompt_len) for span in dict.fromkeys(spans)}  # many entries have few spans
    starts = {0} | {bound for own in positions.values() for run in own for bound in run if bound is not None}
    found: list[tuple[int, list[int]]] = []
    for start in sorted(starts):
        apply = {span for span, own in positions.items() if any(_holds(run, start) for run in own)}
        here = [number for number, span in enumerate(spans) if span in apply]
        if not found or found[-1][1] != here:
            found.append((start, here))
    return found


def reach_back(span: str) -> int:
    """How many of a long prompt's last tokens a span begins before: 0 for one of generated tokens, 1 for ``response``.

    Args:
        span: a span that ``check`` has passed.
    """
    runs_of_long_prompt = (part.run(LONG_PROMPT) for part in _parts(span) or ())
    # A part that a long prompt has not, such as prompt[-5:3], is one of short prompts.
    return max(0, *(LONG_PROMPT if run is None else LONG_PROMPT - run[0] for run in runs_of_long_prompt))


def beyond(span: str, prompt_len: int, num_computed: int) -> str | None:
    """The first part of a span with a slice that begins behind the last token which the model can compute, or None.

    Args:
        span: a span that ``runs`` takes.
        prompt_len: P.
        num_computed: the most tokens of the request that the model computes: all but the last generated one.
    """
    for part in _parts(span) or ():
        if part.slice is not None and (run := part.run(prompt_len)) is not None and run[0] >= num_computed:
            return part.text
    return None


@lru_cache(maxsize=1024)  # a front end asks again with each piece of a streamed reply
def read_run(span: str, skip_first: int, prompt_len: int) -> Run:
    """The positions of a readout.

    Args:
        span: the readout's span.
        skip_first: positions before this one are left out.
        prompt_len: P.

    Raises:
        BadSpan: as ``runs``.
        BadReadout: the positions are not one run that ends with the prompt's tokens or never.
    """
    found = runs(span, prompt_len)
    first, end = found[0]
    if len(found) > 1 or (end is not None and end > prompt_len):
        raise BadReadout(
            f"a readout has span {span!r}; allowed: one run of tokens, which ends among the prompt's tokens or never, "
            "such as prompt[2:], response or generated[8:]. Read what lies between too, or trace it."
        )
    return max(first, skip_first), end


def _holds(run: Run, position: int) -> bool:
    first, end = run
    return first <= position and (end is None or position < end)


@lru_cache(maxsize=256)
def _parts(span: str) -> tuple[_Part, ...] | None:
    """None if it is no span."""
    texts = [text.strip() for text in span.split("+", _MOST_PARTS)]
    parts = [_part(text) for text in texts]
    return None if None in parts or len(parts) > _MOST_PARTS else tuple(part for part in parts if part is not None)


def _part(text: str) -> _Part | None:
    match = _PART.fullmatch(text)
    if match is None:
        return None
    base, index, start, stop = match.groups()
    if text == base:
        return _Part(text, base, None)
    if index is not None:
        first = int(index)
        return _Part(text, base, slice(first, first + 1 or None))
    return _Part(text, base, slice(*(None if bound is None else int(bound) for bound in (start, stop))))


def _check_signs(part: _Part) -> None:
    if part.slice is None or part.base == "prompt":
        return
    if any(bound is not None and bound < 0 for bound in (part.slice.start, part.slice.stop)):
        raise BadSpan(
            f"span part {part.text!r} counts from the end; allowed: that with prompt only, since no end of the other "
            "tokens is known. Count from the start."
        )


def _empty(part: _Part, of_what: str) -> BadSpan:
    return BadSpan(
        f"span part {part.text!r} holds no token {of_what}{' tokens' if of_what[-1].isdigit() else ''}; allowed: parts "
        "with at least one. Leave it out, or move its bounds."
    )
