"""Registers ``torch.ops.vllm_steer.steer_and_read`` and selects the implementation by device.

=========  ===========================================================================================
device     implementation
=========  ===========================================================================================
CPU        ``cpu``: reads the tables on the host, touches only the affected tokens
CUDA       ``triton_kernels``, which Triton compiles on first use; ``reference`` without Triton
XPU        ``reference``: no host sync and no data-dependent shape, so graphs can capture it
=========  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from vllm_steer.ops import cpu, reference

_LIBRARY = torch.library.Library("vllm_steer", "FRAGMENT")
_NAME = "steer_and_read"
# What the op writes is declared as mutated: the compiler removes an op that mutates nothing and returns nothing.
_LIBRARY.define(
    f"{_NAME}(Tensor(a!) hidden, Tensor? residual, Tensor bank, Tensor row_of_token, Tensor entry_slot, Tensor "
    "entry_ab, Tensor entry_mode, Tensor entry_gate, Tensor entry_threshold, Tensor(b!) probe, Tensor prompt_sums, "
    "Tensor prompt_part, Tensor keep, Tensor segment, Tensor(c!) sums, Tensor(d!) last, Tensor trace_slot, "
    "Tensor(e!) trace, Tensor(f!) cut, Tensor(g!) rows, Tensor flags) -> ()"
)


def _on_cuda(*args: Any) -> None:
    _cuda_implementation()(*args)


@cache
def _cuda_implementation() -> Callable[..., None]:
    """Selected at the first call, so that a process without a GPU never imports Triton for it."""
    if find_spec("triton") is None:
        return reference.steer_and_read
    from vllm_steer.ops import triton_kernels

    return triton_kernels.steer_and_read


def _fake(*args: torch.Tensor | None) -> None:
    """Nothing is returned, so there is no shape to work out."""


_LIBRARY.impl(_NAME, cpu.steer_and_read, "CPU")
_LIBRARY.impl(_NAME, _on_cuda, "CUDA")
_LIBRARY.impl(_NAME, reference.steer_and_read, "XPU")
torch.library.register_fake(f"vllm_steer::{_NAME}", _fake, lib=_LIBRARY)

steer_and_read: Callable[..., None] = torch.ops.vllm_steer.steer_and_read.default
"""The op; arguments as ``reference.steer_and_read``."""
