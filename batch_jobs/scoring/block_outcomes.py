"""Outcomes of a run by block: the samples of one scenario and seed, which differ in α alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.statistics.rates import Cell

_KEYS = ["model", "layer", "direction", "span", "scenario", "block", "alpha"]


@dataclass(frozen=True, order=True)
class GridKey:
    """What is held fixed while scenario, seed and α vary; the op is `add`."""

    model: str
    layer: int
    direction: str
    span: str


BlockOutcomes = Mapping[GridKey, Mapping[tuple[str, int], Mapping[float, Cell]]]
"""Grid -> (scenario, seed) -> α -> empathetic samples and samples."""


def block_outcomes(measures: pa.Table) -> BlockOutcomes:
    """Count the outcomes of `measure_generations` by block, α = 0 included.

    A block is a seed; where rows have none, a sample number. Rows with neither, without an answer, or of another op
    than `add` are left out. Unsteered rows belong to every direction and span of their model and layer.
    """
    usable = pc.invert(pc.or_(measures["failed"], measures["in_thought"]))
    of_add = pc.or_(pc.equal(measures["op"], "add"), pc.equal(measures["alpha"], 0.0))
    block = pc.coalesce(measures["seed"], measures["sample"].cast(pa.int64()))
    measures = measures.append_column("block", block)
    rows = measures.filter(pc.and_(pc.and_(usable, of_add), pc.is_valid(block)))
    # counts do not depend on the order of the rows
    groups = rows.group_by(_KEYS).aggregate([("empathetic", "sum"), ([], "count_all")]).to_pylist()
    unsteered: dict[tuple[str, int], dict[tuple[str, int], Cell]] = {}
    found: dict[GridKey, dict[tuple[str, int], dict[float, Cell]]] = {}
    for row in groups:
        place = row["scenario"], row["block"]
        if row["alpha"] == 0.0:
            cells = unsteered.setdefault((row["model"], row["layer"]), {})
            cells[place] = _sum(cells.get(place), row)
        else:
            key = GridKey(row["model"], row["layer"], row["direction"], row["span"])
            found.setdefault(key, {}).setdefault(place, {})[row["alpha"]] = _sum(None, row)
    for key, blocks in found.items():
        for place, cell in unsteered.get((key.model, key.layer), {}).items():
            blocks.setdefault(place, {})[0.0] = cell
    return {key: found[key] for key in sorted(found)}


def _sum(cell: Cell | None, row: Mapping[str, Any]) -> Cell:
    successes, samples = cell or (0, 0)
    return successes + row["empathetic_sum"], samples + row["count_all"]
