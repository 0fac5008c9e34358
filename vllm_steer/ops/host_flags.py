"""The flags of a step on the host, so that a hook with nothing to do launches no kernel.

A launch takes many times longer on the host than the kernel takes on the device, and the forward pass of a long prompt
is not a captured graph: the host launches all of it. During capture everything is launched, because the graph is
replayed for other steps. Passes without requests launch everything too; they compile kernels before a capture.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.plan.step_plan import READ, ROWS, STEER, SUMS, TRACE


class HostFlags:
    """The flags of one worker's hooked layers.

    Args:
        on_device_L4: (L, 4) int32; the op gets one row per layer.
        on_host_L4: (L, 4) int32; the same values, as the next pass will find them on the device.

    Attributes:
        is_step: whether the next pass is a step, and not a pass without requests.
    """

    def __init__(self, on_device_L4: torch.Tensor, on_host_L4: npt.NDArray[np.int32]) -> None:
        self.is_step = False
        self._on_host_L4 = on_host_L4
        self._layer_at = {row_4.data_ptr(): layer for layer, row_4 in enumerate(on_device_L4)}
        for address in self._layer_at:
            _KNOWN[address] = self

    def at(self, address: int) -> tuple[bool, bool]:
        """For the layer whose flags are at ``address``: (anything steered, traced or stored, anything summed)."""
        if not self.is_step:
            return True, True
        flags_4 = self._on_host_L4[self._layer_at[address]]
        read = int(flags_4[READ])
        return bool(flags_4[STEER] or flags_4[TRACE] or read & ROWS), bool(read & SUMS)


_KNOWN: WeakValueDictionary[int, HostFlags] = WeakValueDictionary()
"""Address of a layer's flags on its device -> the flags of its worker, for as long as the tensors exist."""


def asked(flags_4: torch.Tensor) -> tuple[bool, bool]:
    """Whether a call with these flags must launch the kernel that steers, traces and stores, and the one that sums."""
    if flags_4.is_cuda and torch.cuda.is_current_stream_capturing():
        return True, True
    known = _KNOWN.get(flags_4.data_ptr())
    return (True, True) if known is None else known.at(flags_4.data_ptr())
