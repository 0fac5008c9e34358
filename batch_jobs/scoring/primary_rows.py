"""The rows of the success rates that a study's primary hypothesis is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batch_jobs.config.primary import Primary
from batch_jobs.config.steering import controlled_direction
from batch_jobs.rows.generation_parts import ScoreError
from batch_jobs.scoring.scores_csv import SuccessRate


def primary_rows(primary: Primary, rates: Iterable[SuccessRate], scenarios: Sequence[str]) -> tuple[SuccessRate, ...]:
    """The rows of `scores_success.csv` for the hypothesis, one a scenario, in the order of the scenarios.

    Args:
        primary: the hypothesis.
        rates: the success rates of the run.
        scenarios: the study's scenarios, which a hypothesis without its own is about.

    Raises:
        ScoreError: a scenario has no row, or several.
    """
    return _rows(primary, rates, scenarios, primary.direction)


def primary_control_rows(
    primary: Primary, rates: Iterable[SuccessRate], scenarios: Sequence[str]
) -> dict[str, tuple[SuccessRate, ...]]:
    """Name of each control of the hypothesis' direction -> its rows, as `primary_rows`; empty for a study without
    controls.

    Raises:
        ScoreError: as `primary_rows`.
    """
    rates = tuple(rates)
    controls = sorted({rate.direction for rate in rates if controlled_direction(rate.direction) == primary.direction})
    return {control: _rows(primary, rates, scenarios, control) for control in controls}


def _rows(
    primary: Primary, rates: Iterable[SuccessRate], scenarios: Sequence[str], direction: str
) -> tuple[SuccessRate, ...]:
    wanted = primary.scenarios or tuple(scenarios)
    found: dict[str, list[SuccessRate]] = {scenario: [] for scenario in wanted}
    for rate in rates:
        if rate.layer == primary.layer and rate.direction == direction and rate.scenario in found:
            found[rate.scenario].append(rate)
    if wrong := {scenario: len(members) for scenario, members in found.items() if len(members) != 1}:
        scenario, number = next(iter(wrong.items()))
        raise ScoreError(
            f"The scores have {number} rows for {direction} at layer {primary.layer} in {scenario}; the primary "
            "hypothesis needs one. Run the study to its end, or score it again."
        )
    return tuple(found[scenario][0] for scenario in wanted)
