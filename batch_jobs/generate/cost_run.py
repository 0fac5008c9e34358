"""The cost of a study's steering, measured in an engine that holds its directions."""

from __future__ import annotations

from batch_jobs.config.steering import control_name, controlled_direction
from batch_jobs.cost.cost_curve import CostPoint
from batch_jobs.cost.materials import CostMaterials
from batch_jobs.cost.measure import measure_cost
from batch_jobs.engine.progress import Progress
from batch_jobs.engine.start_engine import Engine
from batch_jobs.generate.shard_runner import ShardJob, register_steering
from batch_jobs.rows.grid import Condition


def cost_cells(job: ShardJob) -> list[Condition]:
    """One condition for each steering whose cost is measured: of every direction, and of its first control."""
    cells: dict[tuple[int, str, float], Condition] = {}
    for cell in job.conditions:
        base = controlled_direction(cell.direction)
        if cell.steered and (base is None or cell.direction == control_name(base, 0)):
            cells.setdefault((cell.layer, cell.direction, cell.alpha), cell)
    return list(cells.values())


def run_cost(engine: Engine, job: ShardJob, materials: CostMaterials, *, progress: Progress) -> tuple[CostPoint, ...]:
    """Measure the cost of every steering of the study; see `measure_cost`.

    Raises:
        StudyError: a text is too long, or a request ended with an error.
        SteerError: the engine refuses a direction or a steering.
    """
    register_steering(engine, job)
    return measure_cost(engine, cost_cells(job), materials, max_model_len=job.study.max_model_len, progress=progress)
