"""The command `vllm-steer`. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_steer.errors import SteerError

USAGE_EXIT_CODE = 2

app = typer.Typer(
    name="vllm-steer",
    help="Find directions in a model's residual stream, steer with them in vLLM, score what comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="Studies: extract, validate, steer, score, report.", no_args_is_help=True)
app.add_typer(study_app, name="study")


@study_app.command("run")
def study_run(
    config: Annotated[Path, typer.Argument(help="The study's YAML, e.g. configs/studies/demo.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/<config>")] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs: a .jsonl file, or a folder with train_pairs.jsonl and test_pairs.jsonl."),
    ] = None,
    scenarios: Annotated[Path | None, typer.Option(help="Scenarios: a JSON file.")] = None,
    model: Annotated[str | None, typer.Option(help="Local path, hub id, or demo-model.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete earlier results in the run directory first.")
    ] = False,
) -> None:
    """Run a study in one engine, from texts to report. Run again, it goes on where it stopped.

    Options given here replace the config's fields of the same name.
    """
    from rich.console import Console

    from batch_jobs.run_directory import RunDirectory
    from batch_jobs.study import load_study

    given = {"pairs": pairs, "scenarios": scenarios, "model": model}
    study = load_study(config, overrides={field: value for field, value in given.items() if value is not None})
    # after the config is known to be good: this import brings scikit-learn and pyarrow
    from batch_jobs.pipeline import run_study
    from batch_jobs.summary import print_summary

    run = RunDirectory.for_config(config, out)
    result = run_study(study, run, overwrite=overwrite, console=Console(stderr=True))
    print_summary(result, study.concept, Console())


@app.command("demo-model")
def demo_model() -> None:
    """Make the demo model (once, about a minute) and print its folder."""
    from batch_jobs.demo_model import demo_model_path

    print(demo_model_path(progress=lambda line: print(line, file=sys.stderr)))


def main() -> None:
    """Entry point. An error a user can mend is one line on stderr and exit code 2; anything else keeps its
    traceback."""
    try:
        app()
    except SteerError as error:
        print(f"vllm-steer: {error}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None
