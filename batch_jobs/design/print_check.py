"""Output of `study check` and `study power`."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from batch_jobs.design.estimate import READING_SPEEDUP, START_SECONDS
from batch_jobs.design.power import Power
from batch_jobs.design.study_check import StudyCheck, pairs_by_scenario
from batch_jobs.pairs.summary import print_pair_report

SHOWN_CHARACTERS = 200
"""Length of the prompts after the first."""


def print_check(check: StudyCheck, console: Console) -> None:
    """Print the check in the order of a run: pairs, prompts, grid, time, power; problems last."""
    study = check.study
    console.print(f"Study {study.name}: {study.concept.name} in {study.model}", style="bold", highlight=False)
    if check.split is not None:
        _heading(console, "Pairs")
        for name, pairs in (("train", check.split.train), ("test", check.split.test)):
            scenarios = ", ".join(f"{scenario} {count}" for scenario, count in pairs_by_scenario(pairs).items())
            _line(console, f"{name}: {len(pairs)} positive and {len(pairs)} negative texts ({scenarios})")
    if check.pairs is not None:
        print_pair_report(check.pairs, console)
    prompts = [(scenario, prompt) for scenario, several in (check.prompts or {}).items() for prompt in several]
    for number, (scenario, prompt) in enumerate(prompts):
        _heading(console, f"Prompt of {scenario}, {len(prompt.token_ids)} tokens")
        is_cut = number > 0 and len(prompt.text) > SHOWN_CHARACTERS
        _line(console, prompt.text[:SHOWN_CHARACTERS] + " …" if is_cut else prompt.text)
    _heading(console, "Grid")
    for line in (*_grid_lines(check), *_time_lines(check)):
        _line(console, line)
    if check.power is not None:
        _heading(console, "Power")
        print_power(check.power, console)
    for problem in check.problems:
        console.print(f"problem  {problem}", style="red", markup=False, soft_wrap=True)
    if not check.problems:
        _line(console, "Nothing stands in the way of a run.")


def print_power(power: Power, console: Console) -> None:
    """Print what a design can show, as a table."""
    console.print(
        f"{power.samples} samples at each of {power.alphas} levels of α, 0 included; {power.groups} trends and "
        f"{power.comparisons} conditions in all. Chance to see a rise of the rate from {power.low:g} to "
        f"{power.high:g}, one-sided:",
        highlight=False,
    )
    corrected = f"first by Holm of {power.comparisons} or {power.groups}"
    table = Table()
    for name in ("", f"p at most {power.level:g}", corrected):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row(
        f"one condition, {power.low:g} unsteered and {power.high:g} steered (Boschloo)",
        f"{power.condition:.2f}",
        f"{power.condition_corrected:.2f}",
    )
    table.add_row("the highest α against unsteered, in such a trend (Boschloo)", f"{power.condition_in_trend:.2f}", "")
    table.add_row(
        f"the trend over α, from {power.low:g} at the lowest to {power.high:g} at the highest",
        f"{power.trend:.2f}",
        f"{power.trend_corrected:.2f}",
    )
    console.print(table)


def _grid_lines(check: StudyCheck) -> Iterator[str]:
    study, grid = check.study, check.study.steer
    if check.blocks is not None:
        yield f"layers {list(grid.layers)} steered and {list(study.extract.layers)} read, of {check.blocks} blocks"
    for layer in grid.layers:
        names = [study.direction_name(entry) for entry in grid.directions_at(layer)]
        controls = f", {grid.controls.random} random controls of each" if grid.controls else ""
        yield f"layer {layer}: {', '.join(names)}{controls}"
    for direction in check.files:
        length = direction.metadata["stored_norm"]
        yield f"{direction.key} from a file, made a unit vector; its length there is {length:.4g}"
    yield f"α {', '.join(f'{alpha:g}' for alpha in sorted(grid.alphas))} ({grid.alpha_unit}), {grid.samples} samples"
    if study.primary is not None:
        stated = study.primary
        least = "" if stated.minimum is None else f" of at least {stated.minimum:g}"
        scenarios = ", ".join(stated.scenarios or grid.scenarios)
        yield (
            f"primary hypothesis: a {stated.sign} {stated.outcome}{least}, {stated.direction} at layer {stated.layer}, "
            f"{scenarios}"
        )


def _time_lines(check: StudyCheck) -> Iterator[str]:
    if check.work is None:
        return
    work = check.work
    controls = f", {work.control_rows} of them with controls" if work.control_rows else ""
    yield f"{work.rows} rows{controls}; at most {work.new_tokens} tokens to generate and {work.read_tokens} to read"
    if check.rate is not None and check.seconds is not None:
        rate = check.rate
        reading = "" if rate.includes_reading else f", reading {READING_SPEEDUP:g} times as fast"
        yield (
            f"about {_duration(check.seconds)} at most in one engine: {START_SECONDS:g} s to start, then "
            f"{rate.tokens_per_second:.3g} tokens a second{reading} ({rate.source})"
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False, highlight=False, soft_wrap=True)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
