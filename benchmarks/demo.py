"""The demo study from its configuration to the report, on a machine that is set up: wall seconds of the whole command.

    python -m benchmarks.demo [--runs 3] [--out FILE]

Each run starts in a folder of its own and does all stages. The first one of a machine also compiles the engine's graph,
so it does not count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import record

COMMAND = Path(sys.executable).with_name("vllm-steer")
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "studies" / "demo.yaml"


def main() -> None:
    """Run the study, print the seconds, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="that count; one more before them compiles")
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    arguments = parser.parse_args()
    seconds = [run() for _ in range(arguments.runs + 1)][1:]
    print(f"the demo study: {', '.join(f'{one:.0f}' for one in seconds)} s")
    if arguments.out is not None:
        record.write(arguments.out, {"seconds": seconds}, runs=arguments.runs)


def run() -> float:
    """Seconds of one run."""
    with tempfile.TemporaryDirectory(prefix="bench-demo-") as folder:
        command = [str(COMMAND), "study", "run", str(CONFIG), "--out", str(Path(folder, "run"))]
        start = time.perf_counter()
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    if ran.returncode:
        raise SystemExit(f"the study failed:\n{ran.stderr[-4000:]}")
    return seconds


if __name__ == "__main__":
    main()
