"""What the op is told to do in one engine step; ``batch_plan`` makes it. Letters of shapes as there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

STEER, READ, TRACE = 0, 1, 2
"""Columns of ``StepPlan.flags_L3``, and of what the op gets."""
VERSION = 3
"""A further column of what the op gets; see ``ops.reference``."""


@dataclass(frozen=True, slots=True)
class TracedTokens:
    """The step's tokens [token, token + count) are those of the request from ``position`` on, and are traced.

    The last ``num_drafts`` of them are draft tokens.
    """

    request_id: str
    token: int
    position: int
    count: int
    num_drafts: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The tables of one step.

    Attributes:
        row_of_token_T: row of the entry table, -1 for a token that nobody steers.
        keep_A: 0 for an accumulator that is set to zero before its segment is added.
        segment_A2: first token and number of tokens that each accumulator takes in.
        flags_L3: most entries of a row, whether anything is read, whether anything is traced, at each layer.
        new_rows: what the entry table gets, see ``EntryRows.take_changes``.
        trace_slot_LK: None when it is that of the step before.
        accepted: pairs (accumulator, draft accumulator): the second is to be added to the first before the step.
    """

    num_tokens: int
    row_of_token_T: IntArray
    keep_A: IntArray
    segment_A2: IntArray
    flags_L3: IntArray
    new_rows: list[tuple[int, IntArray]] = field(default_factory=list)
    trace_slot_LK: IntArray | None = None
    traced: list[TracedTokens] = field(default_factory=list)
    accepted: list[tuple[int, int]] = field(default_factory=list)

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
