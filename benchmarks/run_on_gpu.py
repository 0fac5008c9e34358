"""All that wants an NVIDIA GPU, in one command: kernels, the custom op, the full engine, and hooks on the same weights.

    python -m benchmarks.run_on_gpu [--out benchmarks/results/gpu] [--shape qwen2.5-7b]

Needs no network and no model: the engine runs on random weights in the shape of Qwen2.5-7B, from a temporary folder
(15 GB on disk; 80 GB of GPU memory are enough). A step that fails is recorded, and the next one runs all the same. Each
step leaves its own record in the folder; gpu.json holds the machine, the commands, how each ended and its last output.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import vllm_024
from benchmarks.random_checkpoint import SHAPES

STEP_SECONDS = 3600
TAIL_CHARACTERS = 6000
_PACKAGES = ("vllm", "torch", "triton", "transformers", "vllm-steer")


@dataclass(frozen=True)
class Step:
    """One command of the run, and how it ended.

    Attributes:
        exit_code: None where it was ended for taking more than an hour.
        output: the end of what it printed.
    """

    name: str
    command: str
    exit_code: int | None
    seconds: float
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder for the records")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b", help="of the random weights")
    parser.add_argument("--small", action="store_true", help="the small form of every benchmark")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"run_on_gpu needs a CUDA device, and torch {torch.__version__} sees none; run it on a GPU machine.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    small = ["--small"] if arguments.small else []
    steps: list[Step] = []
    with tempfile.TemporaryDirectory(prefix="run-on-gpu-") as folder:
        model = str(Path(folder, arguments.shape))
        commands = {
            "kernels": ["pytest", "tests/ops", "-m", "gpu", "-q"],
            "op": ["benchmarks.bench_op", *small, "--out", str(arguments.out / "op.json")],
            "weights": ["benchmarks.random_checkpoint", model, "--shape", arguments.shape],
            # Random weights of the engine's own are as good as those on disk here, and are there sooner. The three
            # engines of these ways fit beside each other into 80 GB.
            "overhead": [
                "benchmarks.bench_overhead", *small, "--model", model, "--load-format", "dummy", "--kv-gib", "2",
                "--turns", "call", "--starts", "2",
                "--ways", "absent", "installed", "idle", "steered", "stacked", "prompt read", "read",
                "--out", str(arguments.out / "overhead.json"),
            ],
            "hooks": [
                "benchmarks.bench_hf_hooks", *small, "--model", model, "--device", "cuda",
                "--out", str(arguments.out / "hf-hooks.json"),
            ],
        }  # fmt: skip
        for name, command in commands.items():
            print(f"{name} ...", flush=True)
            steps.append(run(name, [sys.executable, "-m", *command]))
            print(steps[-1].output)
            print(f"{name}: exit code {steps[-1].exit_code} after {steps[-1].seconds:.0f} s\n", flush=True)
            write(arguments.out / "gpu.json", steps)  # after each step: what there is, is kept
    sys.exit(any(step.exit_code != 0 for step in steps))


def run(name: str, command: list[str]) -> Step:
    """Run a step to its end, or for an hour."""
    began = time.monotonic()
    try:
        ran = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=STEP_SECONDS,
            env=os.environ | (vllm_024.ENVIRONMENT if vllm_024.is_here() else {}),
        )  # fmt: skip
        exit_code, output = ran.returncode, ran.stdout
    except subprocess.TimeoutExpired as expired:
        exit_code, output = None, (expired.stdout or b"").decode(errors="replace")
    shown = shlex.join(["python", *command[1:]])
    return Step(name, shown, exit_code, round(time.monotonic() - began, 1), output[-TAIL_CHARACTERS:])


def write(path: Path, steps: list[Step]) -> None:
    """The machine, the versions and the steps so far."""
    device = torch.cuda.get_device_properties(0)
    setup = {
        "gpu": device.name,
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        **{package: _version(package) for package in _PACKAGES},
    }
    document = {"setup": setup, "steps": [asdict(step) for step in steps]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _driver() -> str | None:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return asked.stdout.splitlines()[0].strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
