"""Does a direction carry over? Leave each scenario, or each writer, out of the making and test on it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from batch_jobs.directions.auroc import AurocEstimate, estimate_auroc
from batch_jobs.directions.layer_choice import project_held_out
from batch_jobs.directions.readout_file import PairReadouts, rows_of
from batch_jobs.directions.word_baselines import TextSides, WordBaselines, choose_texts, score_by_words, word_baselines


@dataclass(frozen=True)
class LeftOutGroup:
    """Pairs of one scenario or writer, told apart by what was made of all other pairs, train and test."""

    pairs: int
    layers: dict[int, AurocEstimate]
    """Layer -> AUROC of the mean difference of the other pairs."""
    words: WordBaselines
    """The bag of words is fitted on the other pairs."""


def leave_groups_out(
    by_layer: Mapping[int, PairReadouts], texts: TextSides, groups: Sequence[str | None]
) -> dict[str, LeftOutGroup]:
    """Test each group on what the others make.

    Args:
        by_layer: layer -> readouts of all pairs at the block read for it.
        texts: the same pairs' texts.
        groups: the group of each pair. A pair of None belongs to no group that is left out.

    Returns:
        Group -> its result, in the order of their names; empty with fewer than two groups.

    Raises:
        StudyError: the readouts of the other pairs give no direction.
    """
    names = sorted({group for group in groups if group is not None})
    if len(names) < 2:
        return {}
    return {name: _left_out(by_layer, texts, [group == name for group in groups]) for name in names}


def _left_out(by_layer: Mapping[int, PairReadouts], texts: TextSides, is_out: Sequence[bool]) -> LeftOutGroup:
    out, others = np.flatnonzero(is_out), np.flatnonzero(np.logical_not(is_out))
    tested = choose_texts(texts, out)
    return LeftOutGroup(
        pairs=len(out),
        layers={
            layer: estimate_auroc(*project_held_out(rows_of(pairs, others), rows_of(pairs, out)))
            for layer, pairs in by_layer.items()
        },
        words=word_baselines(tested, score_by_words(choose_texts(texts, others), tested)),
    )
