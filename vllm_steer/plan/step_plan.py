"""The tables of one engine step, built by ``batch_plan`` for the op. Letters of shapes as there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

STEER, READ, TRACE = 0, 1, 2
"""Columns of ``StepPlan.flags_L3``, and of the op's flags."""
SUMS, ROWS = 1, 2
"""Bits in the column ``READ``: segments are summed; the rows of all tokens are stored."""
VERSION = 3
"""A further column of the op's flags; see ``ops.reference``."""


@dataclass(frozen=True, slots=True)
class TracedTokens:
    """Tokens of one request that are traced, or whose rows are stored: the step's tokens [token, token + count).

    Attributes:
        request_id: the request.
        token: index of the first one in the step.
        position: its position in the request.
        count: number of tokens, draft tokens included.
        num_drafts: how many of the last ones are draft tokens.
    """

    request_id: str
    token: int
    position: int
    count: int
    num_drafts: int


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Prompt tokens of one request whose probes are summed: the step's tokens [token, token + count).

    Attributes:
        place: the request's row in the sums over prompts.
        token, count: see above.
        is_first: whether they are the first of the prompt, so that the sum begins with them.
    """

    place: int
    token: int
    count: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The tables of one step.

    Attributes:
        num_tokens: T.
        row_of_token_T: row of the entry table for each token; -1 if the token is not steered.
        keep_A: 0 for an accumulator that is set to zero before its segment is added, else 1.
        segment_A2: first token and number of tokens of each accumulator's segment.
        flags_L3: at each layer: most entries of a row, what is read (``SUMS``, ``ROWS`` or both), whether anything is
            traced.
        new_rows: new rows of the entry table, see ``EntryRows.take_changes``.
        trace_slot_LK: see ``TraceColumns.take_changes``; None if unchanged since the step before.
        traced: the traced tokens of each request.
        watched: the generated tokens of each request with watches.
        stored: the tokens of each request whose rows are stored.
        accepted: pairs (accumulator, draft accumulator); the second is added to the first before the step.
        prompt_parts: the prompt tokens to sum for conditions over the prompt.
        parked, returned: pairs (request, row in the sums over prompts): rows that are put aside before the step, and
            then rows that take up again what was put aside.
    """

    num_tokens: int
    row_of_token_T: IntArray
    keep_A: IntArray
    segment_A2: IntArray
    flags_L3: IntArray
    new_rows: list[tuple[int, IntArray]] = field(default_factory=list)
    trace_slot_LK: IntArray | None = None
    traced: list[TracedTokens] = field(default_factory=list)
    watched: list[TracedTokens] = field(default_factory=list)
    accepted: list[tuple[int, int]] = field(default_factory=list)
    prompt_parts: list[PromptPart] = field(default_factory=list)
    parked: list[tuple[str, int]] = field(default_factory=list)
    returned: list[tuple[str, int]] = field(default_factory=list)
    stored: list[TracedTokens] = field(default_factory=list)

    @classmethod
    def blank(cls, num_layers: int, num_accumulators: int, num_tokens: int = 0) -> StepPlan:
        """A step in which nothing is steered, read or traced."""
        return cls(
            num_tokens=num_tokens,
            row_of_token_T=np.full(num_tokens, -1, np.int32),
            keep_A=np.ones(num_accumulators, np.int32),
            segment_A2=np.zeros((num_accumulators, 2), np.int32),
            flags_L3=np.zeros((num_layers, 3), np.int32),
        )
