"""Control directions: random vectors of a direction's length, as a rule orthogonal to it."""

from __future__ import annotations

import numpy as np

from batch_jobs.config.steering import control_name
from vllm_steer import Direction


def control_direction(direction: Direction, *, seed: int, number: int = 0, orthogonal: bool = True) -> Direction:
    """A random direction at the same layer, of the given one's length and orthogonal to it.

    It tells what any push of that length does to a model, whatever it means. The vector is Gaussian, without its
    component along the direction unless `orthogonal` is false; it depends on `seed`, `number` and the direction's
    content only.

    Args:
        direction: shape (D,), D at least 2.
        seed: of all controls of an evaluation.
        number: which control of this direction.
        orthogonal: false leaves the vector as it was drawn; in D dimensions its cosine to the direction is then about
            1/√D.

    Raises:
        MalformedSpec: the name with its ending is too long.
    """
    along_D = direction.vector.astype(np.float64) / direction.norm
    content = int(direction.content_hash[:16], 16)  # so that two directions have different controls
    random_D = np.random.default_rng([seed, number, content]).standard_normal(along_D.size)
    if orthogonal:
        random_D -= (random_D @ along_D) * along_D
    vector_D = random_D * (direction.norm / np.linalg.norm(random_D))
    metadata: dict[str, str | float | bool | None] = {
        "control_of": direction.key,
        "control_seed": seed,
        "control_number": number,
    }
    if not orthogonal:
        metadata["control_orthogonal"] = False
    return Direction(control_name(direction.name, number), direction.layer, vector_D.astype(np.float32), metadata)
