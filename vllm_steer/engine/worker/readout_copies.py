"""Copies readouts to the host: those that end in one step together, and without waiting for the device.

A single readout takes about ten calls to the device. On an accelerator it also needs pinned memory for the copy, and
each new piece of pinned memory costs more than all these calls. So readouts with the same layers and projections are
gathered and copied together, and the pinned memory is released for reuse as soon as the copies have arrived.

Letters of shapes: L requested layers, P projections, D hidden size; for one readout N rows of sums and M rows of last
tokens, see ``FinishedReadout``; R rows of several readouts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.engine.resolved_spec import ResolvedReadout
from vllm_steer.engine.worker import traces
from vllm_steer.engine.worker.readout_store import FinishedReadout
from vllm_steer.plan.batch_plan import PoolingState

_Alike = tuple[tuple[int, ...], tuple[tuple[int, int], ...], bool]
"""Readouts that are taken together share these: layer indices, (row of these, slot) per projection, ``vectors``."""


@dataclass(frozen=True, slots=True)
class Summed:
    """A sample whose readout is to be taken in its present state.

    Attributes:
        spec, state, trace, watched, rows, prompt_sums_G: see ``FinishedReadout``, which takes them over.
        before_last: rows from ``TailRows``, at all hooked layers, of the tokens before the last one in the sum.
    """

    spec: ResolvedReadout
    state: PoolingState
    trace: traces.Trace | None
    before_last: Sequence[torch.Tensor] = ()
    watched: traces.Trace | None = None
    rows: traces.Trace | None = None
    prompt_sums_G: torch.Tensor | None = None

    @property
    def alike(self) -> _Alike:
        """Key of the readouts that are taken together with this one."""
        projections = tuple((self.spec.layers.index(one.layer), one.slot) for one in self.spec.project)
        return tuple(self.spec.layer_indices), projections, self.spec.vectors

    @property
    def num_tail(self) -> int:
        """Number of rows of last tokens that it needs."""
        return len(self.before_last) + 1 if self.is_open or self.spec.pool == "last" else 0

    @property
    def is_open(self) -> bool:
        """Whether tokens may have to be subtracted or drafts added; sums never run past a fixed end."""
        return self.spec.end is None


class ReadoutFlow:
    """Takes readouts out of the accumulators of one worker.

    Args:
        buffers: hold the accumulators and the bank.
    """

    def __init__(self, buffers: SteerBuffers) -> None:
        self._buffers = buffers
        self._under_way: deque[tuple[list[FinishedReadout], Callable[[], bool]]] = deque()

    def take(self, samples: Sequence[Summed]) -> list[FinishedReadout]:
        """Start to copy the accumulators of samples to the host, and return the readouts in the same order.

        Never waits. The values are valid after a synchronisation of the device, or once ``fetch`` finds the copies
        complete. Projections are computed now and not at collection, because the bank may have changed by then.
        """
        groups: dict[_Alike, list[int]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault(sample.alike, []).append(number)
        taken: dict[int, FinishedReadout] = {}
        for alike, numbers in groups.items():
            readouts, has_arrived = self._start(alike, [samples[number] for number in numbers])
            taken.update(zip(numbers, readouts, strict=True))
            self._under_way.append((readouts, has_arrived))
        self.fetch()
        return [taken[number] for number in range(len(samples))]

    def fetch(self) -> None:
        """Release the shared host buffers whose copies have arrived. Never waits."""
        while self._under_way and self._under_way[0][1]():
            readouts, _ = self._under_way.popleft()
            for readout in readouts:
                readout.settle()

    def _start(self, alike: _Alike, samples: Sequence[Summed]) -> tuple[list[FinishedReadout], Callable[[], bool]]:
        """The readouts, and a function that returns whether their values have arrived on the host."""
        layer_indices, projections, vectors = alike
        rows_LRD = self._rows(layer_indices, samples)
        layer_P, slot_P = [layer for layer, _ in projections], [slot for _, slot in projections]
        if projections:
            projected_PR = (rows_LRD[layer_P] * self._buffers.bank_SD[slot_P][:, None]).sum(dim=2)
        else:  # saves five calls
            projected_PR = rows_LRD.new_zeros(0, rows_LRD.shape[1])
        if not vectors:
            rows_LRD = rows_LRD[:0]
        # The copies run in order: when the second has arrived, so has the first.
        rows_LRD, _ = traces.start_copy(rows_LRD)
        projected_PR, has_arrived = traces.start_copy(projected_PR)
        readouts, sums_end, tail_end = [], 0, sum(map(_num_sums, samples))
        for sample in samples:
            sums = slice(sums_end, sums_end := sums_end + _num_sums(sample))
            tail = slice(tail_end, tail_end := tail_end + sample.num_tail)
            readouts.append(
                FinishedReadout(
                    spec=sample.spec,
                    state=sample.state,
                    sums_LND=rows_LRD[:, sums] if vectors else None,
                    tail_LMD=rows_LRD[:, tail] if vectors else None,
                    sums_PN=projected_PR[:, sums],
                    tail_PM=projected_PR[:, tail],
                    trace=sample.trace,
                    watched=sample.watched,
                    rows=sample.rows,
                    prompt_sums_G=sample.prompt_sums_G,
                )
            )
        return readouts, has_arrived

    def _rows(self, layer_indices: Sequence[int], samples: Sequence[Summed]) -> torch.Tensor:
        """A copy of all rows of these samples: first the sums of each, then the last tokens of each, oldest first."""
        buffers, layers = self._buffers, list(layer_indices)
        with_tail = [one for one in samples if one.num_tail]
        summed_N = [row for one in samples for row in _summed_rows(one)]
        num_sums, size = len(summed_N), buffers.bank_SD.shape[1]
        # The end of each tail. Rows of last tokens are in the buffers, earlier ones in ``before_last``.
        end_M = list(accumulate((one.num_tail for one in with_tail), initial=num_sums))[1:]
        rows_LRD = buffers.bank_SD.new_empty(len(layers), end_M[-1] if end_M else num_sums, size)
        indices = torch.tensor([*summed_N, *(one.state.accumulator for one in with_tail)])
        index_N, index_M = indices.to(rows_LRD.device, non_blocking=True).split([num_sums, len(with_tail)])
        has_earlier = any(one.before_last for one in with_tail)
        for rows_RD, layer in zip(rows_LRD, layers, strict=True):
            torch.index_select(buffers.sums_L_AD[layer], 0, index_N, out=rows_RD[:num_sums])
            if has_earlier:
                rows_RD[[end - 1 for end in end_M]] = buffers.last_L_AD[layer][index_M]
            elif with_tail:
                torch.index_select(buffers.last_L_AD[layer], 0, index_M, out=rows_RD[num_sums:])
        for one, end in zip(with_tail, end_M, strict=True):
            for place, earlier_LD in enumerate(one.before_last, start=end - one.num_tail):
                rows_LRD[:, place] = earlier_LD[layers]
        return rows_LRD


def _summed_rows(sample: Summed) -> list[int]:
    """The accumulator, and those of the drafts that may have been accepted."""
    return [sample.state.accumulator, *(sample.state.drafts if sample.is_open else ())]


def _num_sums(sample: Summed) -> int:
    return len(_summed_rows(sample))
