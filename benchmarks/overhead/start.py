"""The second start of a configured, compiled engine against that of plain vLLM: whole processes, in turn.

    python -m benchmarks.overhead.start [--rounds 7] [--out FILE]

A start runs from the start of the process until the engine is ready. Each way is started once before, which compiles
its graph and its op; what counts are the starts after that, one process at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.engine_process import COMPILED_WITH, EngineProcess
from benchmarks.harness.fastest_dtype import fastest_dtype
from benchmarks.harness.rounds import figures, in_turn, interval

BASELINE, CONFIGURED = "absent", "configured"


def main() -> None:
    """Time the starts, print the figures, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    arguments = parser.parse_args()
    model, dtype = demo_model_path(), fastest_dtype()
    num_layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    engine_args = {
        "model": str(model), "dtype": dtype, **COMPILED_WITH, "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30, "seed": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:

        def starting(name: str) -> Callable[[], float]:
            layers = None if name == BASELINE else list(range(num_layers))

            def seconds() -> float:
                engine = EngineProcess(layers, name != BASELINE, engine_args, Path(folder, f"{name}.log"))
                try:
                    return engine.wait().start_seconds
                finally:
                    engine.close()

            return seconds

        ways = {name: starting(name) for name in (BASELINE, CONFIGURED)}
        in_turn(ways, 1)
        rounds = in_turn(ways, arguments.rounds)
    found = figures(rounds, BASELINE)
    for name, figure in found.items():
        low, high = interval(figure.ratios)
        print(f"{name:12} {figure.median:6.1f} s   ratio {figure.ratio:.3f} ({low:.3f} - {high:.3f})")
    if arguments.out is not None:
        about = {"model": model.name, "dtype": dtype, "layers": num_layers, "rounds": arguments.rounds}
        record.write(arguments.out, {"figures": {name: asdict(one) for name, one in found.items()}}, **about)


if __name__ == "__main__":
    main()
