"""Control directions: random vectors of a direction's length that have nothing of it."""

from __future__ import annotations

import re

import numpy as np

from vllm_steer import Direction

_ENDING = re.compile(r"(?P<name>.+)\.control(?P<number>\d+)")


def control_name(name: str, number: int) -> str:
    """Name of a control of the direction `name`: `empathy.control0`."""
    return f"{name}.control{number}"


def controlled_direction(name: str) -> str | None:
    """The direction whose control has this name; None for a name that is no control's."""
    match = _ENDING.fullmatch(name)
    return match["name"] if match else None


def control_direction(direction: Direction, *, seed: int, number: int = 0) -> Direction:
    """A random direction at the same layer, orthogonal to the given one and of its length.

    It tells what any push of that length does to a model, whatever it means. The vector is Gaussian, without its
    component along the direction; it depends on `seed`, `number` and the direction's content only.

    Args:
        direction: shape (D,), D at least 2.
        seed: of all controls of an evaluation.
        number: which control of this direction.

    Raises:
        MalformedSpec: the name with its ending is too long.
    """
    along_D = direction.vector.astype(np.float64) / direction.norm
    content = int(direction.content_hash[:16], 16)  # so that two directions have different controls
    random_D = np.random.default_rng([seed, number, content]).standard_normal(along_D.size)
    random_D -= (random_D @ along_D) * along_D
    vector_D = random_D * (direction.norm / np.linalg.norm(random_D))
    metadata: dict[str, str | float | bool | None] = {
        "control_of": direction.key,
        "control_seed": seed,
        "control_number": number,
    }
    return Direction(control_name(direction.name, number), direction.layer, vector_D.astype(np.float32), metadata)
