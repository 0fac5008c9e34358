"""Control directions."""

from __future__ import annotations

import numpy as np
import pytest

from batch_jobs.config.steering import control_name, controlled_direction
from batch_jobs.directions.control import control_direction
from vllm_steer import Direction

SIZE = 576
KIND = Direction("kind", 3, 7.5 * np.random.default_rng(1).standard_normal(SIZE))


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_control_is_as_long_as_its_direction_and_orthogonal_to_it(number: int) -> None:
    control = control_direction(KIND, seed=2, number=number)
    # float32 rounds each of the 576 numbers to within 6e-8 of its size
    assert control.norm == pytest.approx(KIND.norm, rel=1e-6)
    cosine = float(control.vector.astype(float) @ KIND.vector.astype(float)) / (control.norm * KIND.norm)
    assert abs(cosine) < 1e-6
    assert (control.name, control.layer) == (f"kind.control{number}", 3)
    assert control.metadata == {"control_of": "kind@3", "control_seed": 2, "control_number": number}


def test_a_control_that_need_not_be_orthogonal_is_as_it_was_drawn() -> None:
    free = control_direction(KIND, seed=2, orthogonal=False)
    assert free.norm == pytest.approx(KIND.norm, rel=1e-6)
    cosine = float(free.vector.astype(float) @ KIND.vector.astype(float)) / (free.norm * KIND.norm)
    assert 1e-4 < abs(cosine) < 0.3  # about 1/√576
    assert free.metadata["control_orthogonal"] is False


def test_the_control_of_a_unit_direction_is_one() -> None:
    assert control_direction(KIND.normalised(), seed=0).is_unit


def test_a_control_depends_on_seed_number_and_content_alone() -> None:
    first = control_direction(KIND, seed=0)
    assert control_direction(Direction("other", 9, KIND.vector), seed=0).content_hash == first.content_hash
    scaled = Direction("kind", 3, 2 * KIND.vector)
    others = [
        control_direction(KIND, seed=1),
        control_direction(KIND, seed=0, number=1),
        control_direction(scaled, seed=0),
    ]
    for other in others:
        # independent Gaussian vectors of 576 numbers have a cosine of about 0.04
        assert abs(float(other.vector @ first.vector)) / (other.norm * first.norm) < 0.3


def test_a_control_is_told_by_its_name() -> None:
    assert controlled_direction(control_name("empathy-pca", 12)) == "empathy-pca"
    for name in ("empathy", "empathy.control", "control0", ".control0", "empathy.control0x"):
        assert controlled_direction(name) is None
