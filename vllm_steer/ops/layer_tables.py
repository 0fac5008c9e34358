"""The tensors of a hooked layer, found by the address of its flags.

Compiled code holds one tensor of each hooked layer, its flags, and the op finds the others by their address. It lies in
memory that is allocated once and never moves. So a call of the op carries three arguments instead of twenty-one, whose
unpacking costs more than what an idle layer has to do.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch


class LayerTables(NamedTuple):
    """What ``reference.steer_and_read`` takes after hidden and residual, in its order; shapes as there."""

    bank_SD: torch.Tensor
    row_of_token: torch.Tensor
    entry_slot_RE: torch.Tensor
    entry_ab_RE2: torch.Tensor
    entry_mode_RE: torch.Tensor
    entry_gate_RE: torch.Tensor
    entry_threshold_RE: torch.Tensor
    probe_TG: torch.Tensor
    prompt_sums_MG: torch.Tensor
    prompt_part_M2: torch.Tensor
    keep_A: torch.Tensor
    segment_A2: torch.Tensor
    sums_AD: torch.Tensor
    last_AD: torch.Tensor
    trace_slot_K: torch.Tensor
    trace_TK: torch.Tensor
    cut_R: torch.Tensor
    rows_TD: torch.Tensor
    flags_4: torch.Tensor


_TABLES: dict[int, LayerTables] = {}
"""Address of a layer's flags on its device -> all its tables, for as long as their owner lives."""


def keep(owner: object, layers: Sequence[LayerTables]) -> None:
    """Let the op find these layers' tables until ``owner`` is gone."""
    addresses = [tables.flags_4.data_ptr() for tables in layers]
    _TABLES.update(zip(addresses, layers, strict=True))
    weakref.finalize(owner, _forget, addresses).atexit = False


def tables_at(flags_4: torch.Tensor) -> LayerTables:
    """All tables of the layer with these flags.

    Raises:
        KeyError: they are of no layer that is kept.
    """
    return _TABLES[flags_4.data_ptr()]


def _forget(addresses: Sequence[int]) -> None:
    for address in addresses:
        del _TABLES[address]
