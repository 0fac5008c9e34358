"""The goals for the recorded figures, and whether they are met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.rounds import at_least, interval


@dataclass(frozen=True)
class Goal:
    """A lower bound for a ratio.

    Attributes:
        text: names the two ways that are compared.
        record: name of the record that holds the figure.
        path: keys of the figure in the record, which is a ``rounds.Figure`` as a dict.
        bound: the least ratio.
    """

    text: str
    record: str
    path: tuple[str, ...]
    bound: float


@dataclass(frozen=True)
class Verdict:
    """A goal and its measurement.

    Attributes:
        ratio: the median ratio; None if it was not measured.
        low, high: 95 % confidence interval of that median.
    """

    goal: Goal
    ratio: float | None = None
    low: float = 0.0
    high: float = 0.0

    @property
    def state(self) -> str:
        """ "held", "missed", "undecided" (the interval holds the bound) or "not measured"."""
        if self.ratio is None:
            return "not measured"
        return at_least(self.goal.bound, self.low, self.high)


_THROUGHPUT = ("generated", "64", "throughput")

GOALS = (
    Goal("installed, not configured, against plain vLLM", "overhead", (*_THROUGHPUT, "installed"), 0.99),
    Goal("configured and idle, against plain vLLM", "overhead", (*_THROUGHPUT, "idle"), 0.99),
    Goal("all steered, every α different, against plain vLLM", "overhead", (*_THROUGHPUT, "steered"), 0.98),
    Goal("all prompts read at 5 layers, against plain vLLM", "overhead", (*_THROUGHPUT, "prompt read"), 0.97),
    Goal("grid, against the paper's own way", "hf-hooks", ("grid", "figures", "ours"), 50.0),
    Goal("grid, against the best batched hooks", "hf-hooks", ("grid", "figures_to_batched", "ours"), 3.0),
    Goal("extraction, against the paper's own way", "hf-hooks", ("extraction", "figures", "ours"), 5.0),
    *(
        Goal(f"{int(count):,} {what}, against one", "scale", (part, "figures", count), 0.97)
        for part, what in (("specs", "different specs in flight"), ("registered", "registered directions"))
        for count in ("100", "10000")
    ),
)


def verdicts(records: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """A verdict on every goal, from the existing records (name -> content)."""
    return [_verdict(goal, records.get(goal.record, {})) for goal in GOALS]


def _verdict(goal: Goal, record: Mapping[str, Any]) -> Verdict:
    figure: Any = record
    for key in goal.path:
        if key not in figure:
            return Verdict(goal)
        figure = figure[key]
    return Verdict(goal, figure["ratio"], *interval(figure["ratios"]))
