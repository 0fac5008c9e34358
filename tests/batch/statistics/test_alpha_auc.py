from __future__ import annotations

import pytest
from sklearn.metrics import roc_auc_score

from batch_jobs.statistics.alpha_auc import alpha_auc

STEP = {-2.0: (0, 5), -1.0: (0, 5), 0.0: (0, 5), 1.0: (5, 5), 2.0: (5, 5)}


def test_it_is_the_area_under_the_curve_of_alpha_as_a_score() -> None:
    cells = {3.0: (4, 5), -20.0: (0, 5), 0.0: (3, 15), 5.0: (5, 6)}
    samples = [(alpha, k < hits) for alpha, (hits, size) in cells.items() for k in range(size)]
    alphas, outcomes = zip(*samples, strict=True)
    found = alpha_auc(cells)
    assert found is not None
    assert found.value == pytest.approx(roc_auc_score(outcomes, alphas), rel=1e-12)
    assert found.low < found.value < found.high


def test_a_perfect_step_reaches_one_and_still_has_a_width() -> None:
    found = alpha_auc(STEP)
    assert found is not None
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.7 < found.low < 1.0
    downwards = alpha_auc({-alpha: cell for alpha, cell in STEP.items()})
    assert downwards is not None
    assert downwards.value == 0.0


def test_the_same_counts_give_the_same_interval() -> None:
    assert alpha_auc(dict(reversed(STEP.items()))) == alpha_auc(STEP)


@pytest.mark.parametrize("cells", [{0.0: (2, 5)}, {0.0: (0, 5), 1.0: (0, 5)}, {0.0: (5, 5), 1.0: (3, 3)}])
def test_nothing_that_varies_has_no_auc(cells: dict[float, tuple[int, int]]) -> None:
    assert alpha_auc(cells) is None
