"""Registers ``torch.ops.vllm_steer.steer_and_read`` and chooses the implementation by device.

=========  ==================================================================================
device     implementation
=========  ==================================================================================
CPU        ``cpu``: looks at the flags on the host, touches only the tokens concerned
others     ``reference``: no host sync and no data-dependent shape, so CUDA graphs can hold it
=========  ==================================================================================

A kernel for another device is plugged in with ``use(dispatch_key, implementation)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_steer.ops import cpu, reference

_LIBRARY = torch.library.Library("vllm_steer", "FRAGMENT")
_NAME = "steer_and_read"
# hidden, the sums, the last rows and the trace are declared as mutated: an op that mutates nothing and returns nothing
# would be removed by the compiler.
_LIBRARY.define(
    f"{_NAME}(Tensor(a!) hidden, Tensor? residual, Tensor bank, Tensor row_of_token, Tensor entry_slot, Tensor "
    "entry_ab, Tensor accumulator_of_token, Tensor keep, Tensor last_token, Tensor(b!) sums, Tensor(c!) last, "
    "Tensor trace_slot, Tensor(d!) trace, Tensor flags) -> ()"
)


def use(dispatch_key: str, implementation: Callable[..., None]) -> None:
    """Make ``implementation`` the op for a dispatch key such as ``"CPU"`` or ``"CUDA"``."""
    _LIBRARY.impl(_NAME, implementation, dispatch_key)


def _fake(*args: torch.Tensor | None) -> None:
    """Nothing is returned, so there is no shape to work out."""


use("CPU", cpu.steer_and_read)
use("CUDA", reference.steer_and_read)
use("XPU", reference.steer_and_read)
torch.library.register_fake(f"vllm_steer::{_NAME}", _fake, lib=_LIBRARY)

steer_and_read: Callable[..., None] = torch.ops.vllm_steer.steer_and_read.default
