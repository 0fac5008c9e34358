"""Compiles ``steer_and_read.cpp`` for this machine once, and loads it.

It is compiled at the first start of an engine on a CPU, in seconds, by the compiler that PyTorch's Inductor uses there
too, and kept beside vLLM's own compiled code. Its name holds a digest of all that went into it: the source, PyTorch,
the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("steer_and_read.cpp")
_OPTIMISED = ("-O3", "-std=c++20", "-fopenmp-simd", "-fPIC", "-shared")
# The oldest PyTorch whose stable ABI has all that the source asks for, as its headers spell it.
_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_TORCH = Path(torch.__file__).parent


class BuildFailed(Exception):
    """The op could not be compiled or loaded; the message says why."""


def load() -> ctypes.CDLL:
    """Register the op's CPU implementation with PyTorch and return the library, compiled first where it is not yet.

    Raises:
        BuildFailed: no compiler, no folder to write to, or the compiler refused.
    """
    compiler = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"steer_and_read-{_digest(version)}.so"
        if not library.exists():
            _compile(compiler, library)
        torch.ops.load_library(str(library))
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        raise BuildFailed(f"{compiler} failed: {error.stderr.strip()[-2000:]}") from error
    except OSError as error:
        raise BuildFailed(str(error)) from error


def cache_folder() -> Path:
    """Where compiled code is kept: ``vllm_steer`` in vLLM's cache (vllm/envs.py@0.32.0, VLLM_CACHE_ROOT)."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    root = Path(os.environ.get("VLLM_CACHE_ROOT", caches / "vllm")).expanduser()
    return root / "vllm_steer"


def _compile(compiler: str, library: Path) -> None:
    """Compile to a file of its own and rename it, so that processes that start together never load half a file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        beside = [f"-I{_TORCH / 'include'}", str(_SOURCE), f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
        command = [compiler, *_OPTIMISED, _tuned(), _ABI, *beside, "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        made.replace(library)


def _tuned() -> str:
    return "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"


def _digest(compiler_version: str) -> str:
    said = (_SOURCE.read_text(), torch.__version__, compiler_version, *_OPTIMISED, _tuned(), _ABI, _processor())
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]


def _processor() -> str:
    """Names the processor, since machines of several kinds may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
