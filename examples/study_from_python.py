"""Run a small study from Python: the bundled pairs, one scenario, three strengths; then read its scores.

    python examples/study_from_python.py demo-model --out runs/small

Run again, it goes on where it stopped. `vllm-steer study run` does the same from a YAML file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from batch_jobs.config.study import Study
from batch_jobs.pipeline import RunOptions, run_study
from batch_jobs.run.run_directory import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or demo-model")
    parser.add_argument("--out", type=Path, required=True, help="the run directory")
    parser.add_argument("--layer", type=int, default=16)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=60)
    given = parser.parse_args()

    study = Study.model_validate(
        {
            "name": "small",
            "model": given.model,
            "max_model_len": 512,
            "engine": {"enforce_eager": True, "kv_cache_gib": 1},
            "skip_first": 1,
            "extract": {"layers": [given.layer], "max_tokens": 256},
            "validation": {"lexical_ablation": False, "random_directions": 20, "bootstrap": 200},
            "steer": {
                "layers": [given.layer],
                "alphas": [-0.2, 0, 0.2],
                "alpha_unit": "residual_norm",
                "scenarios": ["the_listener"],
                "samples": given.samples,
            },
            "sampling": {"max_tokens": given.max_tokens},
        }
    )
    result = run_study(study, RunDirectory(given.out), RunOptions(quiet=True), console=Console(stderr=True))
    best = result.validation.layers[result.validation.best_layer]
    print(f"AUROC {best.auroc:.3f} at layer {best.layer}; {result.generated} rows generated, {result.reused} reused")
    for condition in result.scores.conditions:
        print(f"alpha {condition.alpha:8.2f}  empathetic {condition.empathy_rate:.2f}  {condition.coherence_rate:.2f}")
    print(result.run.report)


if __name__ == "__main__":
    main()
