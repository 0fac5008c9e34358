"""Finds the token with which a watch holds. Pure: no vLLM, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Bound(Protocol):
    """What a watch asks of consecutive tokens, as in ``resolved_spec.Watched``."""

    @property
    def is_above(self) -> bool:
        """Whether a value above ``bound`` counts, and not one below it."""

    @property
    def bound(self) -> float:
        """The bound, which is compared as a float32, like the values."""

    @property
    def patience(self) -> int:
        """How many values in a row must be beyond the bound."""


class WatchRun:
    """Counts how many values in a row were beyond a bound, however the sequence of values is cut into steps.

    Args:
        watch: the bound and the patience.
        first: position of the first value.

    Attributes:
        next_position: position of the value that is due.
    """

    def __init__(self, watch: Bound, first: int = 0) -> None:
        self.next_position = first
        self._bound = float(np.float32(watch.bound))
        self._is_above = watch.is_above
        self._patience = watch.patience
        self._in_a_row = 0

    def see(self, position: int, values: Sequence[float]) -> int | None:
        """Take in the values from ``position`` on; those that were seen before are skipped.

        Returns:
            The position of the value with which the watch holds, or None. A NaN is never beyond the bound.

        Raises:
            AssertionError: values are missing between those seen so far and these.
        """
        assert position <= self.next_position
        for value in values[self.next_position - position :]:
            is_beyond = value > self._bound if self._is_above else value < self._bound
            self._in_a_row = self._in_a_row + 1 if is_beyond else 0
            self.next_position += 1
            if self._in_a_row == self._patience:
                return self.next_position - 1
        return None
