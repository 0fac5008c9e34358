"""The Triton kernels: interpreted on any machine, compiled for a GPU on any machine, and run where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT_ROOT = Path(__file__).resolve().parents[2]
KERNELS = "tests/ops/on_triton.py"

# Triton needs no GPU to compile for one, and its interpreter accepts code that its compiler rejects.
BUILD = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_steer.ops import triton_kernels
from vllm_steer.ops.stream_range import FLOAT16_LIMIT

POINTERS = {"bank": "*fp32", "row_of_token": "*i32", "entry_slot": "*i32", "entry_ab": "*fp32", "entry_mode": "*i32",
            "entry_gate": "*i32", "entry_threshold": "*fp32", "probe": "*fp32",
            "prompt_sums": "*fp32", "prompt_part": "*i32",
            "trace_slot": "*i32", "trace": "*fp32", "cut": "*i32", "rows": "*fp32", "flags": "*i32",
            "keep": "*i32", "segment": "*i32",
            "sums": "*fp32", "last": "*fp32"}
CONSTANTS = {"D": 3584, "K": 8, "G": 4, "HAS_RESIDUAL": True, "HAS_ROWS": True, "LIMIT": FLOAT16_LIMIT}
KERNELS = [(triton_kernels._steer_and_trace, {"BLOCK_D": 4096})]
for tiling in (triton_kernels.FEW, triton_kernels.MANY):
    KERNELS.append((triton_kernels._read, {"BLOCK_T": tiling.block_t, "BLOCK_D": tiling.block_d}))
for (kernel, blocks), kind in itertools.product(KERNELS, ("*bf16", "*fp16", "*fp32")):
    constants = {name: value for name, value in (CONSTANTS | blocks).items() if name in kernel.arg_names}
    types = dict.fromkeys(kernel.arg_names, "i32") | POINTERS | {"hidden": kind, "residual": kind}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def run(*command: str, is_interpreted: bool) -> str:
    # PYTEST_ADDOPTS is for the run that this test is part of: with it, the child would overwrite that run's report.
    dropped = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment | ({"TRITON_INTERPRET": "1"} if is_interpreted else {}),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.slow
def test_interpreted_kernels_agree_with_the_loop() -> None:
    pytest.importorskip("triton")
    run("-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "not gpu", KERNELS, is_interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_agree_with_the_loop_and_with_the_reference() -> None:
    out = run("-m", "pytest", "-p", "no:cacheprovider", "-q", KERNELS, is_interpreted=False)
    assert "skipped" not in out


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    run("-c", BUILD, is_interpreted=False)
