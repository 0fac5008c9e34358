"""`vllm-steer lm-eval` and `vllm-steer evaluate`: benchmarks of a steered model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

_MODEL = "vllm-steer"


def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[lm-eval arguments]", show_default=False)] = None,
) -> None:
    """Run lm-eval's own command line with the model `vllm-steer`, which steers generations and log-likelihoods."""
    from lm_eval.__main__ import cli_evaluate

    import_module("batch_jobs.harnesses.lm_eval_model")  # registers the model
    sys.argv = ["lm-eval", *with_model(arguments or ())]
    cli_evaluate()


def with_model(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments, with `--model vllm-steer` where they run an evaluation and name no model."""
    named = {word.partition("=")[0] for word in arguments}
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("-"))
    # the file of --config may name one
    if not runs or named & {"--model", "-M", "--config", "-C", "--help", "-h"}:
        return list(arguments)
    return [*arguments, "--model", _MODEL]


def evaluate(
    config: Annotated[Path, typer.Argument(help="The evaluation's YAML, e.g. configs/evaluations/demo.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Parquet file to write.", show_default="runs/<config>/evaluation.parquet")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of another evaluation in that file.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, for logs.")] = False,
) -> None:
    """Run lm-eval tasks over directions and α in one engine, beside the unsteered model and random directions.

    Run again, it goes on where it stopped.
    """
    from rich.console import Console

    from batch_jobs.config.evaluation import load_evaluation
    from batch_jobs.engine.start_engine import set_engine_environment

    evaluation = load_evaluation(config)
    set_engine_environment()  # before lm-eval brings torch, and so OpenMP
    from batch_jobs.harnesses.evaluate import evaluate as run
    from batch_jobs.harnesses.result_table import print_results

    target = out if out is not None else Path("runs") / config.stem / "evaluation.parquet"
    results = run(evaluation, target, console=Console(stderr=True), overwrite=overwrite, quiet=quiet)
    print_results(results, Console())
    print(target)
