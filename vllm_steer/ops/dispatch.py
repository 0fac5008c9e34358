"""Registers ``torch.ops.vllm_steer.steer_and_read`` and selects the implementation by device.

=========  ===========================================================================================
device     implementation
=========  ===========================================================================================
CPU        ``native``, C++ that is compiled on first use; ``cpu`` where it cannot be compiled
CUDA       ``triton_kernels``, which Triton compiles on first use; ``reference`` without Triton
XPU        ``reference``: no host sync and no data-dependent shape, so graphs can capture it
=========  ===========================================================================================
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch

from vllm_steer.ops import cpu, layer_tables, reference
from vllm_steer.ops.layer_tables import LayerTables, tables_at
from vllm_steer.ops.native import build

NATIVE_VARIABLE = "VLLM_STEER_NATIVE"
"""Environment variable; 0 selects the Python implementation on a CPU."""

_LIBRARY = torch.library.Library("vllm_steer", "FRAGMENT")
_NAME = "steer_and_read"
# hidden is declared as mutated: the compiler removes an op that mutates nothing and returns nothing. What else the op
# writes, compiled code never reads.
_LIBRARY.define(f"{_NAME}(Tensor(a!) hidden, Tensor? residual, Tensor flags) -> ()")


def is_fast_on(device_type: str) -> bool:
    """Whether a device has an implementation that skips what a step does not need; ``reference`` does all work."""
    return device_type == "cpu" or (device_type == "cuda" and find_spec("triton") is not None)


def connect(owner: object, layers: Sequence[LayerTables]) -> None:
    """Let the op work on these layers until ``owner`` is gone; all are on one device.

    On a CPU the first call of a process selects the implementation, which may take the seconds of a compilation.
    """
    layer_tables.keep(owner, layers)
    if layers and layers[0].flags_4.device.type == "cpu" and (library := _on_cpu().library) is not None:
        for tables in layers:
            numbers = [number for table in tables for number in _place(table)]
            address = tables.flags_4.data_ptr()
            library.vllm_steer_connect(ctypes.c_void_p(address), (ctypes.c_int64 * len(numbers))(*numbers))
            weakref.finalize(owner, library.vllm_steer_disconnect, ctypes.c_void_p(address)).atexit = False


def why_not_native() -> str | None:
    """Why the CPU implementation of this process is the slower one in Python; None where it is not."""
    return _on_cpu().why_not


class _OnCpu:
    """The CPU implementation of this process.

    Attributes:
        library: the compiled one; None for the one in Python.
        why_not: why it is the one in Python.
    """

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.why_not: str | None = None
        if os.environ.get(NATIVE_VARIABLE, "1") == "0":
            self.why_not = f"{NATIVE_VARIABLE}=0"
        else:
            try:
                self.library = build.load()
            except build.BuildFailed as failed:
                self.why_not = str(failed)
        if self.library is None:
            _LIBRARY.impl(_NAME, _with_tables(lambda: cpu.steer_and_read), "CPU")


_on_cpu = cache(_OnCpu)


def _place(table: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Address, two sizes and two strides in bytes; the C++ source steps through four-byte elements."""
    sizes, strides = (*table.shape, 1, 1)[:2], (*table.stride(), 1, 1)[:2]
    assert table.element_size() == 4, table.dtype
    return table.data_ptr(), *sizes, 4 * strides[0], 4 * strides[1]


def _with_tables(select: Callable[[], Callable[..., None]]) -> Callable[..., None]:
    def run(hidden: torch.Tensor, residual: torch.Tensor | None, flags: torch.Tensor) -> None:
        select()(hidden, residual, *tables_at(flags))

    return run


@cache
def _cuda_implementation() -> Callable[..., None]:
    """Selected at the first call, so that a process without a GPU never imports Triton for it."""
    if find_spec("triton") is None:
        return reference.steer_and_read
    from vllm_steer.ops import triton_kernels

    return triton_kernels.steer_and_read


def _fake(hidden: torch.Tensor, residual: torch.Tensor | None, flags: torch.Tensor) -> None:
    """Nothing is returned, so there is no shape to work out."""


_LIBRARY.impl(_NAME, _with_tables(_cuda_implementation), "CUDA")
_LIBRARY.impl(_NAME, _with_tables(lambda: reference.steer_and_read), "XPU")
torch.library.register_fake(f"vllm_steer::{_NAME}", _fake, lib=_LIBRARY)

steer_and_read: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], None] = (
    torch.ops.vllm_steer.steer_and_read.default
)
"""The op: hidden (T, D), which it steers in place, residual (T, D) or None, and the flags of a connected layer."""
