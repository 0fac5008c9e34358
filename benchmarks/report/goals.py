"""The goals for the recorded figures, and whether they are met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.rounds import at_least, interval


@dataclass(frozen=True)
class Goal:
    """A bound for a measured figure.

    Attributes:
        text: what is measured, and against what if it is a ratio.
        record: name of the record that holds the figure.
        path: keys of the figure in the record: a ``rounds.Figure`` as a dict, a list of measurements, or one number.
        bound: the least that counts as reached, or the most.
        is_most: whether the bound is the most.
        unit: of a figure that is no ratio.
        low: where given, the figure itself must reach the bound and its interval lie above this.
    """

    text: str
    record: str
    path: tuple[str, ...]
    bound: float
    is_most: bool = False
    unit: str = ""
    low: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A goal and its measurement.

    Attributes:
        measured: the median; None if it was not measured.
        low, high: 95 % confidence interval of that median; of one measurement, itself.
    """

    goal: Goal
    measured: float | None = None
    low: float = 0.0
    high: float = 0.0

    @property
    def state(self) -> str:
        """ "held", "missed", "undecided" (the interval holds the bound) or "not measured"."""
        if self.measured is None:
            return "not measured"
        if self.goal.is_most:
            return at_least(-self.goal.bound, -self.high, -self.low)
        if self.goal.low is not None and self.measured >= self.goal.bound and self.low > self.goal.low:
            return "held"
        return at_least(self.goal.bound, self.low, self.high)


_GENERATED = ("generated", "64", "throughput")
_FIGURES = ("figures",)

CPU_GOALS = (
    Goal("installed, not configured, against plain vLLM", "overhead", (*_GENERATED, "installed"), 0.99),
    Goal("configured for 5 layers, idle", "overhead", (*_GENERATED, "idle"), 0.99),
    Goal("configured for all layers, idle", "overhead", (*_GENERATED, "idle, all layers"), 0.995),
    Goal("all steered, every α different", "overhead", (*_GENERATED, "steered"), 0.99),
    Goal("all steered, 8 directions at each of 5 layers", "overhead", (*_GENERATED, "stacked"), 0.97),
    Goal("all prompts read at 5 layers", "overhead", (*_GENERATED, "prompt read"), 0.99),
    Goal("all read at all layers, prompts and answers", "overhead", (*_GENERATED, "read, all layers"), 0.95),
    Goal(
        "extraction at 5 layers, against plain vLLM's prefill",
        "overhead",
        ("prefill", "8", "throughput", "prompt read"),
        0.99,
    ),
    Goal("second start of an engine configured for all layers", "start", (*_FIGURES, "configured"), 1.05, is_most=True),
    *(
        Goal(f"admission of a request of {name}", "admission", ("goals", key), most, is_most=True, unit="µs")
        for name, key, most in (
            ("40 entries", "40 entries, from entries to admitted", 250.0),
            ("one entry", "1 entry, from entries to admitted", 20.0),
        )
    ),
    Goal("server, 64 clients, mixed against unsteered", "server", (*_FIGURES, "mixed"), 0.98, low=0.96),
    Goal("demo study after set-up", "demo", ("seconds",), 100.0, is_most=True, unit="s"),
    Goal("scoring 1,000,000 rows", "score", (*_FIGURES, "seconds"), 45.0, is_most=True, unit="s"),
    Goal("its memory, all processes", "score", (*_FIGURES, "peak_gib"), 1.0, is_most=True, unit="GiB"),
    Goal(
        "resume of a grid of 1,000,000 rows", "grid-scale", (*_FIGURES, "resume_seconds"), 30.0, is_most=True, unit="s"
    ),
    Goal(
        "its driver's memory beyond that of 10,000",
        "grid-scale",
        (*_FIGURES, "driver_growth_mib"),
        32.0,
        is_most=True,
        unit="MiB",
    ),
    Goal("grid, against the paper's own way", "hf-hooks", ("grid", "figures", "ours"), 50.0),
    Goal("grid, against the best batched hooks", "hf-hooks", ("grid", "figures_to_batched", "ours"), 3.0),
    *(
        Goal(f"{int(count):,} {what}, against one", "scale", (part, "figures", count), 0.97)
        for part, what in (("specs", "different specs in flight"), ("registered", "registered directions"))
        for count in ("100", "10000")
    ),
)

GPU_GOALS = (
    Goal("installed, not configured, against plain vLLM", "overhead", (*_GENERATED, "installed"), 0.99),
    Goal("configured for 5 layers, idle", "overhead", (*_GENERATED, "idle"), 0.99),
    Goal("all steered, every α different", "overhead", (*_GENERATED, "steered"), 0.98),
    Goal("all steered, 8 directions at each of 5 layers", "overhead", (*_GENERATED, "stacked"), 0.97),
    Goal("all prompts read at 5 layers", "overhead", (*_GENERATED, "prompt read"), 0.98),
    Goal("all read at all layers, prompts and answers", "overhead", (*_GENERATED, "read, all layers"), 0.95),
    Goal(
        "time to first token, 8 directions at each of 5 layers, 64 requests at once",
        "overhead",
        ("generated", "64", "first_token", "stacked"),
        1.05,
        is_most=True,
    ),
    Goal("grid, against batched hooks on the same weights", "hf-hooks", ("grid", "figures_to_batched", "ours"), 5.0),
    Goal("extraction, the same", "hf-hooks", ("extraction", "figures_to_batched", "ours"), 2.0),
)


def goals_of(folder: str) -> Sequence[Goal]:
    """The goals for the records in a folder of this name."""
    return GPU_GOALS if "gpu" in folder else CPU_GOALS


def verdicts(records: Mapping[str, Mapping[str, Any]], goals: Sequence[Goal]) -> list[Verdict]:
    """A verdict on every goal, from the existing records (name -> content)."""
    return [_verdict(goal, records.get(goal.record, {})) for goal in goals]


def _verdict(goal: Goal, record: Mapping[str, Any]) -> Verdict:
    figure: Any = record
    for key in goal.path:
        if key not in figure:
            return Verdict(goal)
        figure = figure[key]
    if isinstance(figure, Mapping):
        return Verdict(goal, figure["ratio"], *interval(figure["ratios"]))
    measurements = figure if isinstance(figure, list) else [figure]
    low, high = interval(measurements)
    return Verdict(goal, statistics.median(measurements), low, high)
