"""A pytest plugin (``-p tests.support.interpreted_triton``) that runs vLLM's V2 runner on the CPU.

vLLM 0.32 has a V2 runner for the CPU, which needs a Triton that compiles for the CPU; the released Triton does not.
Triton's interpreter runs the same kernels, slowly, in numpy. vLLM only has to find a CPU backend when it is imported.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

# Before the import below, at which Triton makes its own functions, interpreted or not.
os.environ.update({"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"})

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
