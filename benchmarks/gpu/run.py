"""All checks that need an NVIDIA GPU, in one command: kernels, custom op, full engine, and hooks on the same weights.

    python -m benchmarks.gpu.run [--out benchmarks/results/gpu] [--shape qwen2.5-7b] [--steps NAME ...]

Needs no network and no model: the engine runs on random weights in the shape of Qwen2.5-7B, which stay in build/gpu
(15 GB; 80 GB of GPU memory are enough; with more, an engine with every layer hooked is measured too). A step that fails
is recorded, and the next one still runs. Each step writes its own record to the folder; gpu.json holds the machine, the
commands, their exit codes and their last output. With --steps, the results of the other steps from earlier runs stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu import vllm_024
from benchmarks.harness.random_checkpoint import SHAPES

WEIGHTS = Path("build/gpu")
STEP_SECONDS = 3600
ENGINE_GIB = 24
"""GPU memory of one benchmark engine, with room to start the next one beside it."""
WAYS = ["absent", "installed", "idle", "steered", "stacked", "prompt read", "read"]
ALL_LAYERS = ["idle, all layers", "read, all layers"]
"""The ways of ``overhead.bench`` that need a fourth engine; WAYS need three."""
TAIL_CHARACTERS = 6000
STEPS = ("kernels", "parity", "op", "weights", "hooks", "overhead")
_PACKAGES = ("vllm", "torch", "triton", "transformers", "vllm-steer")


@dataclass(frozen=True)
class Step:
    """One command of the run, and how it ended.

    Attributes:
        exit_code: None if it was ended after an hour.
        output: the end of its output.
    """

    name: str
    command: str
    exit_code: int | None
    seconds: float
    output: str


def main() -> None:
    """Run the chosen steps; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder for the records")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b", help="of the random weights")
    parser.add_argument("--small", action="store_true", help="the small form of every benchmark")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="some of them only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"a CUDA device is needed, and torch {torch.__version__} sees none; run it on a GPU machine.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = arguments.out / "gpu.json"
    steps = steps_of(document)
    commands = commands_of(WEIGHTS / arguments.shape, arguments.shape, arguments.out, arguments.small)
    for name in (name for name in commands if name in arguments.steps):
        print(f"{name} ...", flush=True)
        steps[name] = step = run(name, [sys.executable, "-m", *commands[name]])
        print(step.output)
        print(f"{name}: exit code {step.exit_code} after {step.seconds:.0f} s\n", flush=True)
        write(document, steps.values())  # after each step, so that a stopped run keeps its results
    sys.exit(any(steps[name].exit_code != 0 for name in arguments.steps))


def commands_of(model: Path, shape: str, out: Path, is_small: bool) -> dict[str, list[str]]:
    """Step -> the module that it runs, and its arguments."""
    tests = ["pytest", *(["-p", vllm_024.__name__] if vllm_024.is_here() else []), "-q", "-m", "gpu"]
    small = ["--small"] if is_small else []
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {
        "kernels": [*tests, "tests/ops"],
        "parity": [*tests, "tests/engine/exact/test_on_gpu.py"],
        "op": ["benchmarks.op", *small, "--out", str(out / "op.json")],
        "weights": ["benchmarks.harness.random_checkpoint", str(model), "--shape", shape],
        "hooks": [
            "benchmarks.hooks.bench",
            *small,
            "--model",
            str(model),
            "--device",
            "cuda",
            "--out",
            str(out / "hf-hooks.json"),
        ],
        # vLLM's own random weights serve as well as those on disk, and load faster. Calls are long enough to show a
        # difference of 1 %.
        "overhead": [
            "benchmarks.overhead.bench",
            *small,
            "--model",
            str(model),
            "--load-format",
            "dummy",
            "--kv-gib",
            "2",
            "--turns",
            "call",
            "--starts",
            "1",
            "--fill-cache",
            "--tokens",
            "16384",
            "--prefill-tokens",
            "512",
            "--prefill-batches",
            "1",
            "16",
            "--ways",
            *WAYS,
            *(ALL_LAYERS if memory_gib >= 4 * ENGINE_GIB else []),
            *([] if is_small else ["--rounds", *["5"] * 4, "--prefill-rounds", "7"]),
            "--out",
            str(out / "overhead.json"),
        ],
    }


def steps_of(document: Path) -> dict[str, Step]:
    """Name -> step of an earlier run, from its gpu.json."""
    if not document.exists():
        return {}
    steps = json.loads(document.read_text(encoding="utf-8"))["steps"]
    return {step["name"]: Step(**step) for step in steps}


def run(name: str, command: list[str]) -> Step:
    """Run a step for at most an hour."""
    began = time.monotonic()
    try:
        ran = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=STEP_SECONDS,
            env=os.environ | (vllm_024.ENVIRONMENT if vllm_024.is_here() else {}),
        )
        exit_code, output = ran.returncode, ran.stdout
    except subprocess.TimeoutExpired as expired:
        exit_code, output = None, (expired.stdout or b"").decode(errors="replace")
    shown = shlex.join(["python", *command[1:]])
    return Step(name, shown, exit_code, round(time.monotonic() - began, 1), output[-TAIL_CHARACTERS:])


def write(path: Path, steps: Iterable[Step]) -> None:
    """Write the machine, the versions and the steps so far to `path`."""
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
            capture_output=True,
            text=True,
            check=True,
        )
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
