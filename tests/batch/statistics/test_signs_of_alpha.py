from __future__ import annotations

import pytest

from batch_jobs.statistics.signs_of_alpha import delta, sign_effects


@pytest.mark.parametrize(
    ("hits", "unsteered", "gain", "loss"),
    [
        ({5.0: 5, -5.0: 1}, 3, 0.4, 0.4),
        ({5.0: 5, -5.0: 3}, 3, 0.4, 0.0),
        ({5.0: 4, -5.0: 4}, 2, 0.4, -0.4),  # both signs raise
        ({5.0: 3, -5.0: 1, 9.0: 5}, 2, 0.2, 0.2),  # 9 has no opposite and is left out
        ({5.0: 5, -5.0: 2, 9.0: 5, -9.0: 0}, 5, 0.0, 0.8),  # at a ceiling
        ({5.0: 2, -5.0: 1, 9.0: 1, -9.0: 2}, 0, 0.3, -0.3),  # at a floor, both signs raise
    ],
)
def test_effects_by_hand(hits: dict[float, int], unsteered: int, gain: float, loss: float) -> None:
    found = sign_effects({alpha: (count, 5) for alpha, count in hits.items()}, (unsteered, 5))
    assert found is not None
    # fractions turn into the nearest float once, so literals are met exactly
    assert (found.gain, found.loss) == (gain, loss)
    assert found.delta.value == pytest.approx(gain + loss, abs=1e-15)
    assert found.gain_minus_loss.value == pytest.approx(gain - loss, abs=1e-15)
    assert found.gain_minus_loss.low < found.gain_minus_loss.value < found.gain_minus_loss.high
    assert found.delta == delta({alpha: (count, 5) for alpha, count in hits.items()})


def test_equal_effects_leave_no_float_dust() -> None:
    # in floats 0.1 + 0.2 - 0.3 is not 0
    cells = {1.0: (1, 10), 2.0: (2, 10), -1.0: (3, 10), -2.0: (0, 10)}
    found = sign_effects(cells, (15, 100))
    assert found is not None
    assert (found.delta.value, found.gain, found.loss, found.gain_minus_loss.value) == (0.0, 0.0, 0.0, 0.0)


def test_the_baseline_widens_gain_minus_loss_and_not_delta() -> None:
    cells = {5.0: (40, 50), -5.0: (10, 50)}
    few, many = sign_effects(cells, (2, 4)), sign_effects(cells, (500, 1000))
    assert few is not None
    assert many is not None
    assert few.delta == many.delta
    widths = [one.gain_minus_loss.high - one.gain_minus_loss.low for one in (few, many)]
    assert widths[0] > 3 * widths[1]


def test_alphas_of_one_sign_have_no_effects() -> None:
    assert delta({5.0: (5, 5), -3.0: (0, 5)}) is None
    assert sign_effects({5.0: (5, 5), -3.0: (0, 5)}, (2, 5)) is None
