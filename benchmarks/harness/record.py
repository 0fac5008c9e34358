"""Records of benchmark runs as JSON: the measurements, with the machine, the versions and the command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from vllm_steer.engine.vllm_versions import vllm_version

RESULTS = Path(__file__).resolve().parents[1] / "results"
_PACKAGES = ("torch", "triton", "transformers", "ray", "numpy", "pyarrow", "vllm-steer")


def write(path: Path, measured: Mapping[str, Any], **arguments: Any) -> None:
    """Write `setup(**arguments)` and then `measured` to `path`, making its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"setup": setup(**arguments), **measured}, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A record that `write` wrote: "setup" and the measurements."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def setup(**arguments: Any) -> dict[str, Any]:
    """The command and date of this process, `arguments`, the machine and the versions."""
    script = getattr(sys.modules["__main__"], "__spec__", None)
    command = ["python", "-m", script.name, *sys.argv[1:]] if script is not None else ["python", *sys.argv]
    return {
        "command": shlex.join(command),
        "date": datetime.now(UTC).date().isoformat(),
        **arguments,
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "vllm": vllm_version(),
        **{name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def hardware() -> str:
    """Name and core count of the CPU, after name and memory of the GPU if there is one."""
    cores = f"{os.cpu_count()} cores of {_cpu_name()}"
    if not torch.cuda.is_available():
        return cores
    device = torch.cuda.get_device_properties(0)
    return f"{device.name} ({device.total_memory / 2**30:.0f} GiB), {cores}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
