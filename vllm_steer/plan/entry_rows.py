"""Assigns rows of the entry table to requests and fills them. Pure: no vLLM, no torch.

A request has one row for each of its windows that is steered, and keeps them while it runs. A step sends only the rows
of the requests that are new in it.

Letters of shapes: R rows, L hooked layers, E entries per row.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RELATIVE, KEEP_NORM, CLAMP, ABOVE, BELOW, STORED, PROBE, PROMPT = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of ``Entry.mode``."""
HELD_SHIFT = 8
"""The bits of ``Entry.mode`` from here on hold 1 + the number of an entry whose condition is counted, see ``HELD``."""
MOST_PROBES = 4
"""G, projections that one token can carry from earlier layers to conditions at later ones."""


class Entry(NamedTuple):
    """The change h + c·d after hooked layer number ``layer_index``, where d is in ``slot`` of the bank.

    Attributes:
        layer_index, slot: see above.
        a, b: c = a + b·⟨h,d⟩; with ``CLAMP``, the bounds between which c moves ⟨h,d⟩, infinite for none.
        mode: bits. With ``RELATIVE``, a (with ``CLAMP`` also b) is in units of ‖h‖. ``KEEP_NORM`` then gives h the
            length that it had before the entry. With ``ABOVE`` (``BELOW``) the entry acts only on tokens where p is
            above (below) ``threshold``: p is ⟨h,w⟩, w in slot ``gate``; with ``STORED``, what a probe has stored. A
            ``PROBE`` changes nothing; it stores ⟨h,d⟩ of the token as its number ``gate``. With ``PROMPT``, p is the
            sum of what probe ``gate`` has stored over all tokens of the request's prompt.
        gate, threshold: see ``mode``.
    """

    layer_index: int
    slot: int
    a: float
    b: float
    mode: int = 0
    gate: int = 0
    threshold: float = 0.0


IntArray = npt.NDArray[np.int32]

Packed = bytes
"""The entries of a window as they travel from admission to the worker, see ``pack``."""


def pack(entries: Iterable[Entry]) -> Packed:
    """Entries as bytes, sorted by layer index; those of one layer keep their order.

    They are the columns of a table, one after the other, each with N little-endian numbers of 4 bytes: layer index,
    slot, a, b, mode, gate, threshold. The columns a, b and threshold are float32, the others int32. No entries are no
    bytes.

    Raises:
        OverflowError: a, b or a threshold is finite and beyond the range of float32. Admission takes none of these.
    """
    columns = list(zip(*sorted(entries, key=itemgetter(0)), strict=True))
    if not columns:
        return b""
    number = len(columns[0])
    return struct.pack(f"<{2 * number}i{2 * number}f{2 * number}i{number}f", *chain.from_iterable(columns))


def unpack(packed: Packed) -> list[Entry]:
    """The entries in ``packed``, with the numbers as float32 holds them."""
    number = len(packed) // 28
    values = struct.unpack(f"<{2 * number}i{2 * number}f{2 * number}i{number}f", packed)
    return [Entry(*values[at::number]) for at in range(number)]


def slots_of(packed: Packed) -> set[int]:
    """The slots of the bank that entries read: those of their directions and of their conditions."""
    if not packed:
        return set()
    columns_7N = _columns(packed)
    slots = set(columns_7N[1].tolist())
    if any(columns_7N[4].tolist()):  # the modes
        mode_N, gate_N = columns_7N[4], columns_7N[5]
        is_seen_here_N = (mode_N & (ABOVE | BELOW) != 0) & (mode_N & (STORED | PROMPT) == 0)
        slots.update(gate_N[is_seen_here_N].tolist())
    return slots


def _columns(packed: Packed) -> IntArray:
    """(7, N) int32, read-only: the columns of ``pack``; of float32 ones the bits."""
    return np.frombuffer(packed, "<i4").reshape(7, -1)


class EntryRows:
    """The rows of one worker.

    Args:
        num_layers: L, hooked layers.
        max_requests: requests that can be scheduled in one step.
        max_entries: E, entries of one row at one layer.
        max_windows: windows of one request; R = max_requests·max_windows.
    """

    def __init__(self, num_layers: int, max_requests: int, max_entries: int, max_windows: int) -> None:
        self._blank_LE8 = np.zeros((num_layers, max_entries, 8), np.int32)
        self._blank_LE8[..., 0] = -1
        self._rows: dict[str, tuple[int, ...]] = {}
        # The tables are sent from their beginning on, so the lowest rows are lent first.
        self._free = list(range(max_requests * max_windows - 1, -1, -1))
        self._depth_RL = np.zeros((max_requests * max_windows, num_layers), np.int32)
        self._changes: list[tuple[int, IntArray]] = []

    def lend(
        self,
        request_id: str,
        windows: Sequence[Packed],
        in_step: Collection[str],
        place: int = 0,
        held_columns: Mapping[int, int] = MappingProxyType({}),
    ) -> tuple[int, ...]:
        """Assign rows to a request until ``release``, and return the row of each window; -1 for one without entries.

        There are as many rows as the windows of all requests that can run. A request that was preempted in a step
        without tokens still holds its rows, because the planner does not see such steps. So if too few rows are free,
        those of requests that are not in this step are taken; such a request gets new rows later.

        Args:
            request_id: the request.
            windows: the entries of each window, at most ``max_windows``; used for new rows only.
            in_step: all requests of this step.
            place: the request's row in the sums over prompts, see ``PromptSums``; used for new rows only.
            held_columns: number of an entry -> trace column for whether its condition holds; used for new rows only.
        """
        rows = self._rows.get(request_id)
        if rows is None:
            needed = sum(map(bool, windows))
            if needed > len(self._free):
                for absent in [one for one in self._rows if one not in in_step]:
                    self.release(absent)
                    if needed <= len(self._free):
                        break
            rows = tuple(self._free.pop() if entries else -1 for entries in windows)
            self._rows[request_id] = rows
            for row, entries in zip(rows, windows, strict=True):
                if entries:
                    self._write(row, entries, place, held_columns)
        return rows

    def lent(self) -> dict[str, tuple[int, ...]]:
        """Request -> the row of each of its windows, for all requests with rows; a copy."""
        return dict(self._rows)

    def release(self, request_id: str) -> None:
        """Free a request's rows; does nothing if it has none."""
        self._free.extend(row for row in reversed(self._rows.pop(request_id, ())) if row >= 0)

    def depth(self, rows: Sequence[int]) -> IntArray:
        """(L,) int32: the most entries that any of these rows has at each layer."""
        depth_L: IntArray = self._depth_RL[rows[0]] if len(rows) == 1 else self._depth_RL[list(rows)].max(axis=0)
        return depth_L

    def take_changes(self) -> list[tuple[int, IntArray]]:
        """The rows written since the last call, and (L, E, 8) int32 for each.

        An entry is (slot, a, b, mode, gate, threshold, 0, 0); a, b and the threshold are the bits of a float32. Slot -1
        means no entry. Entries are packed to the left, in the order given. The gate of one with ``PROMPT`` is the
        number of its sum among those of all requests. The bits of the mode from ``HELD_SHIFT`` on hold 1 + the trace
        column for whether its condition holds, or 0.
        """
        changes, self._changes = self._changes, []
        return changes

    def _write(self, row: int, packed: Packed, place: int, held_columns: Mapping[int, int]) -> None:
        columns_7N = _columns(packed)
        row_LE8 = self._blank_LE8.copy()
        num_layers, most, _ = row_LE8.shape
        depth_L, places = [0] * num_layers, []
        for layer in columns_7N[0].tolist():
            depth = depth_L[layer]
            if layer < 0 or depth == most:
                raise IndexError(f"entry {depth} at layer index {layer}, of {most} at each of {num_layers}")
            places.append(layer * most + depth)
            depth_L[layer] = depth + 1
        entries_8 = row_LE8.reshape(-1, 8)
        entries_8[places, :6] = columns_7N[1:].T
        modes = columns_7N[4].tolist()
        if max(modes) >= PROMPT:
            self._complete(entries_8, places, modes, place, held_columns)
        self._depth_RL[row] = depth_L
        self._changes.append((row, row_LE8))

    def _complete(
        self, entries_8: IntArray, places: Sequence[int], modes: Sequence[int], place: int, columns: Mapping[int, int]
    ) -> None:
        """Fill in what depends on the other requests: the request's sum over its prompt, and its trace columns."""
        for at, mode in zip(places, modes, strict=True):
            if mode & PROMPT:
                entries_8[at, 4] += MOST_PROBES * place
            if mode >> HELD_SHIFT:
                column = columns.get((mode >> HELD_SHIFT) - 1, -1)
                entries_8[at, 3] = mode & ((1 << HELD_SHIFT) - 1) | (column + 1) << HELD_SHIFT
