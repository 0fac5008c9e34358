"""How often the study's intervals hold the true value, and how often its tests reject a true null: simulated.

    python -m tests.support.statistics_table

writes the table into `docs/reference/statistics.md`. Every design is one that a study has: five samples a condition,
three scenarios, five seeds. True values come from the rates that the outcomes are drawn from, by formulas of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batch_jobs.statistics.against_controls import against_controls
from batch_jobs.statistics.alpha_auc import alpha_auc
from batch_jobs.statistics.blocks import Outcomes, grid_slope
from batch_jobs.statistics.exact_tests import directional_p
from batch_jobs.statistics.partial_correlation import partial_correlation
from batch_jobs.statistics.signs_of_alpha import sign_effects
from batch_jobs.statistics.trend import trend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "statistics.md"
BEGIN, END = "<!-- made by python -m tests.support.statistics_table -->\n\n", "\n<!-- end -->"
RUNS = 400
"""Simulated studies for each line: a true coverage of 95 % is found within ±2.2 points in 19 of 20 cases."""
FEW_DRAWS = 399
"""Resamples and permutations within a simulated study, where a real one has 9999."""

Floats = npt.NDArray[np.float64]


class Line(NamedTuple):
    """One line of the table."""

    what: str
    design: str
    kind: str
    """`covers` (of a 95 % interval) or `rejects` (a true null at 0.05)."""
    share: float
    low: float
    """What the share must reach, noise of the simulation included."""
    high: float


PAPER_ALPHAS = np.array([-20.0, -10.0, -5.0, -3.0, 0.0, 3.0, 5.0, 10.0, 20.0])
DEMO_ALPHAS = np.array([-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
FEW_ALPHAS = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
CURVES = {
    "no effect": lambda alphas: np.full(len(alphas), 0.4),
    "weak": lambda alphas: _rising(alphas, -0.4, 1.2),
    "strong": lambda alphas: _rising(alphas, -0.4, 4.0),
    "near a floor": lambda alphas: _rising(alphas, -2.2, 1.5),
}


@cache
def lines() -> tuple[Line, ...]:
    """All lines, in the order of the page."""
    return (*_of_counts(), *_of_blocks(), *_of_correlation())


def table() -> str:
    """The table of the documentation."""
    rows = ["| statistic | design | result | should be |", "|---|---|---|---|"]
    for line in lines():
        wanted = "95 %" if line.kind == "covers" else "5 %" if line.low > 0 else "at most 5 %"
        rows.append(f"| {line.what} | {line.design} | {line.kind} {100 * line.share:.0f} % | {wanted} |")
    return "\n".join(rows) + "\n"


def _rising(alphas: Floats, at_zero: float, reach: float) -> Floats:
    """Logistic rates over α scaled to -1..1."""
    return 1 / (1 + np.exp(-(at_zero + reach * alphas / np.abs(alphas).max())))


def _share(hits: list[bool]) -> float:
    return float(np.mean(hits))


def _of_counts() -> Iterator[Line]:
    for name, alphas, curve in (
        ("4 strengths", PAPER_ALPHAS, "no effect"),
        ("4 strengths", PAPER_ALPHAS, "weak"),
        ("4 strengths", PAPER_ALPHAS, "strong"),
        ("3 strengths", DEMO_ALPHAS, "weak"),
        ("2 strengths", FEW_ALPHAS, "weak"),
        ("1 strength", FEW_ALPHAS[1:4], "weak"),
        ("3 strengths", DEMO_ALPHAS, "near a floor"),
    ):
        rates = CURVES[curve](alphas)
        design = f"{name}, 5 samples, {curve}"
        delta, difference, auc = [], [], []
        up, down, base = rates[alphas > 0].mean(), rates[alphas < 0].mean(), rates[alphas == 0][0]
        misses = np.cumsum(1 - rates) - (1 - rates) / 2
        area = float(rates @ misses / (rates.sum() * (1 - rates).sum()))
        for cells in _cells(alphas, rates):
            found = sign_effects({alpha: cell for alpha, cell in cells.items() if alpha}, cells[0.0])
            assert found is not None
            delta.append(found.delta.low <= up - down <= found.delta.high)
            difference.append(found.gain_minus_loss.low <= up + down - 2 * base <= found.gain_minus_loss.high)
            ranked = alpha_auc(cells, draws=FEW_DRAWS)
            if ranked is not None:
                auc.append(ranked.low <= area <= ranked.high)
        yield Line("Δ", design, "covers", _share(delta), 0.90, 1.0)
        yield Line("gain − loss", design, "covers", _share(difference), 0.90, 1.0)
        yield Line("AUC of α", design, "covers", _share(auc), 0.90, 1.0)
    rates = CURVES["no effect"](PAPER_ALPHAS)
    rejected = []
    for cells in _cells(PAPER_ALPHAS, rates):
        found_trend = trend(list(cells), [cell[0] for cell in cells.values()], [5] * len(cells))
        rejected.append(found_trend is not None and found_trend.p <= 0.05)
    yield Line("p of the trend", "9 α, 5 samples, no effect", "rejects", _share(rejected), 0.02, 0.08)
    # a condition's p has few possible values, so its chance of a rejection is a sum, not a simulation
    hits, base = np.divmod(np.arange(36), 6)
    p = directional_p(np.ones(36, int), hits, np.full(36, 5), base, np.full(36, 5))
    ways = np.array([1, 5, 10, 10, 5, 1])
    worst = max(
        float((ways[hits] * ways[base] * rate ** (hits + base) * (1 - rate) ** (10 - hits - base))[p <= 0.05].sum())
        for rate in np.linspace(0.01, 0.99, 99)
    )
    yield Line("Boschloo’s p", "5 samples against 5, the worst common rate, exact", "rejects", worst, 0.0, 0.05)


def _cells(alphas: Floats, rates: Floats) -> Iterator[dict[float, tuple[int, int]]]:
    hits = np.random.default_rng(1).binomial(5, rates, size=(RUNS, len(alphas)))
    for row in hits.tolist():
        yield {alpha: (count, 5) for alpha, count in zip(alphas.tolist(), row, strict=True)}


def _of_blocks() -> Iterator[Line]:
    alphas, base = DEMO_ALPHAS, np.array([-1.5, -0.4, 0.8])
    for name, reach in (("no effect", 0.0), ("an effect", 1.5)):
        design = f"3 scenarios, 5 seeds that differ, {name}"
        random = np.random.default_rng(2)
        slopes, differences, slope_p, label_p, rank_p = [], [], [], [], []
        seeds = random.normal(size=(RUNS, 3, 5, 1))
        # the mean over many seeds of each scenario's rates, by α
        many = base[:, None, None] + np.random.default_rng(3).normal(size=(3, 20000, 1))
        expected = _logistic(many + reach * alphas / 4).mean(axis=(0, 1))
        places = np.linspace(-0.5, 0.5, len(alphas))
        true_slope = float(expected @ places / (places @ places))
        true_delta = float(expected[alphas > 0].mean() - expected[alphas < 0].mean())
        for run in range(RUNS):
            linear = base[:, None, None] + seeds[run]
            real = _outcomes(random, _logistic(linear + reach * alphas / 4))
            controls = [_outcomes(random, _logistic(linear + 0 * alphas)) for _ in range(19 if run < 200 else 3)]
            slope = grid_slope(real, permutations=FEW_DRAWS)
            against = against_controls(real, controls[:3], permutations=FEW_DRAWS)
            assert slope is not None
            assert against is not None
            if slope.low is not None and slope.high is not None:
                slopes.append(slope.low <= true_slope <= slope.high)
            if against.difference_low is not None and against.difference_high is not None:
                differences.append(against.difference_low <= true_delta <= against.difference_high)
            slope_p.append(slope.p <= 0.05)
            label_p.append(against.p <= 0.05)
            if run < 200 and reach == 0.0:
                ranked = against_controls(real, controls, permutations=1)
                assert ranked is not None
                rank_p.append(ranked.rank_p <= 0.05)
        yield Line("slope of the grid", design, "covers", _share(slopes), 0.91, 0.985)
        yield Line("direction − controls", f"{design}, 3 controls", "covers", _share(differences), 0.91, 0.985)
        if reach == 0.0:
            yield Line("p of the slope", design, "rejects", _share(slope_p), 0.02, 0.08)
            yield Line("p against controls", f"{design}, 3 controls", "rejects", _share(label_p), 0.02, 0.08)
            yield Line("rank p against controls", f"{design}, 19 controls", "rejects", _share(rank_p), 0.0, 0.09)


def _logistic(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)))


def _outcomes(random: np.random.Generator, rates: Floats) -> Outcomes:
    """One sample at every (scenario, seed, α) of `rates`."""
    drawn = (random.random(rates.shape) < rates).astype(int).tolist()
    alphas = DEMO_ALPHAS.tolist()
    return {
        (f"scenario {place}", seed): {alpha: (hit, 1) for alpha, hit in zip(alphas, hits, strict=True)}
        for place, of_scenario in enumerate(drawn)
        for seed, hits in enumerate(of_scenario)
    }


def _of_correlation() -> Iterator[Line]:
    for name, load, shared in (
        ("no relation", 0.0, 0.0),
        ("a relation", 0.5, 0.0),
        ("a relation, seeds that share both", 0.5, 0.7),
    ):
        true = partial_correlation(*_graded(np.random.default_rng(4), 5000, load, shared), permutations=1).r or 0.0
        random, held, rejected = np.random.default_rng(5), [], []
        for _ in range(RUNS):
            found = partial_correlation(*_graded(random, 5, load, shared), permutations=FEW_DRAWS if load == 0.0 else 1)
            assert found.low is not None
            assert found.high is not None
            held.append(found.low <= (true if load else 0.0) <= found.high)
            rejected.append((found.p or 1.0) <= 0.05)
        yield Line("r given α and scenario", f"105 completions, {name}", "covers", _share(held), 0.91, 0.985)
        if load == 0.0:
            yield Line("p of that r", f"105 completions, {name}", "rejects", _share(rejected), 0.02, 0.08)


def _graded(
    random: np.random.Generator, seeds: int, load: float, shared: float
) -> tuple[Floats, Floats, list[tuple[int, int]], list[int]]:
    """Projections, grades, cells and clusters of three scenarios; α moves both, `load` relates them within a cell."""
    scenario, seed, alpha = np.indices((3, seeds, len(DEMO_ALPHAS))).reshape(3, -1)
    cluster = scenario * seeds + seed
    common = shared * random.normal(size=3 * seeds)[cluster]
    own = random.normal(size=len(alpha))
    latent = load * own + np.sqrt(1 - load**2) * random.normal(size=len(alpha)) + common + 0.3 * (alpha - 3)
    grade = (latent > -0.5).astype(np.float64) + (latent > 0.5)
    return (
        own + common + 2.0 * alpha,
        grade,
        list(zip(scenario.tolist(), alpha.tolist(), strict=True)),
        cluster.tolist(),
    )


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
