"""The flags of a step as the host knows them, so that a hook with nothing to do costs an accelerator no launch.

A launch takes the host many times what the kernel takes the device, and a long prompt's pass is no captured graph: the
host launches all of it. Under capture everything is launched, since the graph is replayed for other steps; so it is in
passes that no request stands behind, in which kernels are compiled before a capture.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from vllm_steer.plan.step_plan import READ, STEER, TRACE


class HostFlags:
    """The flags of one worker's hooked layers.

    Args:
        on_device_L4: what the op gets, row by row.
        on_host_L4: int32; the same, as the next pass will find them there.

    Attributes:
        is_step: whether the next pass is a step, and not one that no request stands behind.
    """

    def __init__(self, on_device_L4: torch.Tensor, on_host_L4: npt.NDArray[np.int32]) -> None:
        self.is_step = False
        self._on_host_L4 = on_host_L4
        self._layer_at = {row_4.data_ptr(): layer for layer, row_4 in enumerate(on_device_L4)}
        for address in self._layer_at:
            _KNOWN[address] = self

    def at(self, address: int) -> tuple[bool, bool]:
        """Of the layer whose flags are there: whether anything is steered or traced, and whether anything is read."""
        if not self.is_step:
            return True, True
        flags_4 = self._on_host_L4[self._layer_at[address]]
        return bool(flags_4[STEER] or flags_4[TRACE]), bool(flags_4[READ])


_KNOWN: WeakValueDictionary[int, HostFlags] = WeakValueDictionary()
"""By the address of a layer's flags on its device, for as long as the tensors are there."""


def asked(flags_4: torch.Tensor) -> tuple[bool, bool]:
    """What a call with these flags has to launch: the kernel that steers and traces, the one that reads."""
    if flags_4.is_cuda and torch.cuda.is_current_stream_capturing():
        return True, True
    known = _KNOWN.get(flags_4.data_ptr())
    return (True, True) if known is None else known.at(flags_4.data_ptr())
