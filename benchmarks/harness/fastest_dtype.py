"""The dtype in which a machine computes fastest without losing the range of the demo model."""

from __future__ import annotations

from typing import Literal

import torch


def fastest_dtype(device: str = "cpu") -> Literal["bfloat16", "float32"]:
    """bfloat16, but float32 on a CPU with AVX2 alone, where a product in bfloat16 takes thirty times as long."""
    has_bfloat16 = device != "cpu" or torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))
    return "bfloat16" if has_bfloat16 else "float32"
