"""The way of readouts to the host: those that end in one step together, and nobody waits for the device.

A readout alone takes some ten calls to the device, and on an accelerator pinned memory to be copied into, of which each
new piece costs more than all of them. So what is asked alike is gathered and copied at once, and the pinned memory is
given back, for the next ones to take, as soon as the copies have arrived.

Letters of shapes: L layers that were asked, P projections, D hidden size; for one readout N rows of sums and M rows of
last tokens, see ``FinishedReadout``; R rows of many.
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
from vllm_steer.engine.worker.readouts import FinishedReadout
from vllm_steer.plan.batch_plan import PoolingState

_Alike = tuple[tuple[int, ...], tuple[tuple[int, int], ...], bool]
"""What readouts that are taken at once share: layer indices, (row of these, slot) of each projection, ``vectors``."""


@dataclass(frozen=True, slots=True)
class Summed:
    """A sample whose readout is to be taken, as it stands.

    Attributes:
        spec, state, trace: see ``FinishedReadout``, whose they become.
        before_last: the rows, at all hooked layers, of the tokens before the last one in the sum: ``TailRows``.
    """

    spec: ResolvedReadout
    state: PoolingState
    trace: traces.Trace | None
    before_last: Sequence[torch.Tensor] = ()

    @property
    def alike(self) -> _Alike:
        projections = tuple((self.spec.layers.index(layer), slot) for _, layer, slot in self.spec.project)
        return tuple(self.spec.layer_indices), projections, self.spec.vectors

    @property
    def is_open(self) -> bool:
        """Whether tokens may have to be taken back out, or drafts added; an end that was told is not overrun."""
        return self.spec.end is None


class ReadoutFlow:
    """Takes readouts out of the accumulators of one worker.

    Args:
        buffers: they, and the bank.
    """

    def __init__(self, buffers: SteerBuffers) -> None:
        self._buffers = buffers
        self._under_way: deque[tuple[list[FinishedReadout], Callable[[], bool]]] = deque()

    def take(self, samples: Sequence[Summed]) -> list[FinishedReadout]:
        """Copy the accumulators of samples, in their order. Never waits; the values are there behind a synchronised
        device, or once ``fetch`` has found them.

        The projections are taken here and not when they are collected: the bank may have changed by then.
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
        """Let go of what was brought to the host, where it has arrived. Never waits."""
        while self._under_way and self._under_way[0][1]():
            readouts, _ = self._under_way.popleft()
            for readout in readouts:
                readout.settle()

    def _start(self, alike: _Alike, samples: Sequence[Summed]) -> tuple[list[FinishedReadout], Callable[[], bool]]:
        """Readouts with values that have arrived on the host once the answer is yes."""
        layer_indices, projections, vectors = alike
        rows_LRD = self._rows(layer_indices, samples)
        layer_P, slot_P = [layer for layer, _ in projections], [slot for _, slot in projections]
        if projections:
            projected_PR = (rows_LRD[layer_P] * self._buffers.bank_SD[slot_P][:, None]).sum(dim=2)
        else:  # five calls for nothing
            projected_PR = rows_LRD.new_zeros(0, rows_LRD.shape[1])
        if not vectors:
            rows_LRD = rows_LRD[:0]
        # One after another, so the last one's arrival is that of both.
        rows_LRD, _ = traces.start_copy(rows_LRD)
        projected_PR, has_arrived = traces.start_copy(projected_PR)
        readouts, sums_end, tail_end = [], 0, sum(map(_num_sums, samples))
        for sample in samples:
            sums = slice(sums_end, sums_end := sums_end + _num_sums(sample))
            tail = slice(tail_end, tail_end := tail_end + _num_tail(sample))
            readouts.append(
                FinishedReadout(
                    spec=sample.spec,
                    state=sample.state,
                    sums_LND=rows_LRD[:, sums] if vectors else None,
                    tail_LMD=rows_LRD[:, tail] if vectors else None,
                    sums_PN=projected_PR[:, sums],
                    tail_PM=projected_PR[:, tail],
                    trace=sample.trace,
                )
            )
        return readouts, has_arrived

    def _rows(self, layer_indices: Sequence[int], samples: Sequence[Summed]) -> torch.Tensor:
        """A copy of all rows of these samples: the sums of each, and then the last tokens of each, oldest first."""
        buffers, layers = self._buffers, list(layer_indices)
        with_tail = [one for one in samples if one.is_open]
        summed_N = [row for one in samples for row in _summed_rows(one)]
        num_sums, size = len(summed_N), buffers.bank_SD.shape[1]
        # Where each tail ends; the rows of last tokens are in the buffers, and those before them were kept.
        end_M = list(accumulate(map(_num_tail, with_tail), initial=num_sums))[1:]
        rows_LRD = buffers.bank_SD.new_empty(len(layers), end_M[-1] if end_M else num_sums, size)
        indices = torch.tensor([*summed_N, *(one.state.accumulator for one in with_tail)])
        index_N, index_M = indices.to(rows_LRD.device, non_blocking=True).split([num_sums, len(with_tail)])
        has_earlier = any(one.before_last for one in with_tail)
        for rows_RD, layer in zip(rows_LRD, layers, strict=True):
            torch.index_select(buffers.sums_L_AD[layer], 0, index_N, out=rows_RD[:num_sums])
            if has_earlier:
                rows_RD[[end - 1 for end in end_M]] = buffers.last_L_AD[layer][index_M]
            else:
                torch.index_select(buffers.last_L_AD[layer], 0, index_M, out=rows_RD[num_sums:])
        for one, end in zip(with_tail, end_M, strict=True):
            for place, earlier_LD in enumerate(one.before_last, start=end - _num_tail(one)):
                rows_LRD[:, place] = earlier_LD[layers]
        return rows_LRD


def _summed_rows(sample: Summed) -> list[int]:
    """The accumulator, and those of drafts of which nobody has told yet whether they were accepted."""
    return [sample.state.accumulator, *(sample.state.drafts if sample.is_open else ())]


def _num_sums(sample: Summed) -> int:
    return len(_summed_rows(sample))


def _num_tail(sample: Summed) -> int:
    return len(sample.before_last) + 1 if sample.is_open else 0
