"""`vllm-steer study`: check a study, run it, compare two runs. `grades` has the commands that judge and score a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from batch_jobs.cli import grades
from batch_jobs.cli.pool_options import Address, CpusPerWorker, Executor, ExecutorName, GpusPerWorker, Workers, pool_of

app = typer.Typer(help="Studies: extract, validate, steer, score, report.", no_args_is_help=True)


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(help="The study's YAML, e.g. configs/studies/demo.yaml.")],
    out: Annotated[
        str | None,
        typer.Option(
            help="Run directory: a folder, or an address in an object store, e.g. s3://bucket/runs/demo.",
            show_default="runs/<config>",
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs: a .jsonl file, or a folder with train_pairs.jsonl and test_pairs.jsonl."),
    ] = None,
    scenarios: Annotated[Path | None, typer.Option(help="Scenarios: a JSON file.")] = None,
    model: Annotated[str | None, typer.Option(help="Local path, hub id, or demo-model.")] = None,
    executor: Executor = ExecutorName.LOCAL,
    workers: Workers = 1,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    address: Address = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the rows again that are stored with an error.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete earlier results in the run directory first.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, for logs.")] = False,
) -> None:
    """Run a study from texts to report. Run again, it goes on where it stopped.

    Options given here replace the config's fields of the same name.
    """
    pool = pool_of(executor, workers, gpus_per_worker, cpus_per_worker, address)
    given = {"pairs": pairs, "scenarios": scenarios, "model": model}
    overrides = {field: value for field, value in given.items() if value is not None}
    run_config(config, out, overrides, pool=pool, overwrite=overwrite, retry_failed=retry_failed, quiet=quiet)


def run_config(config: Path, out: str | Path | None, overrides: Mapping[str, Any], **options: Any) -> None:
    """Run the study of a config file and print its summary.

    Args:
        config: the study's YAML.
        out: the run directory, a folder or an address in an object store; None is `runs/<config file's stem>`.
        overrides: fields that replace the config's.
        options: fields of `RunOptions`.

    Raises:
        SteerError: the config or its texts are wrong, or a step of the study failed.
    """
    from rich.console import Console

    from batch_jobs.config.study import load_study
    from batch_jobs.engine.start_engine import set_engine_environment, without_collection

    study = load_study(config, overrides=overrides)
    set_engine_environment()
    with without_collection():
        # after the config is known to be good: this import brings scikit-learn, and so OpenMP, and pyarrow
        from batch_jobs.pipeline import RunOptions, run_study
        from batch_jobs.print_summary import print_summary
        from batch_jobs.run.open_run import open_run
        from batch_jobs.run.run_directory import RunDirectory

    given = RunOptions(**options)
    place = RunDirectory.for_config(config, None).path if out is None else out
    with open_run(place, drives=True, fetch=not given.overwrite) as directory:
        result = run_study(study, directory, given, console=Console(stderr=True))
        print_summary(result, study.concept, Console())


@app.command("check")
def check(
    config: Annotated[Path, typer.Argument(help="The study's YAML.")],
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs beside it tell the speed.", show_default="runs/<config>")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="As for `study run`.")] = None,
    scenarios: Annotated[Path | None, typer.Option(help="As for `study run`.")] = None,
    model: Annotated[str | None, typer.Option(help="As for `study run`.")] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(min=0.001, help="Generation speed to reckon with.", show_default="an earlier run's, or a guess"),
    ] = None,
) -> None:
    """Look at a study before it runs, without an engine: texts, prompts, grid, time and power.

    Exit code 1 when there are problems.
    """
    from rich.console import Console

    from batch_jobs.config.study import load_study
    from batch_jobs.run.run_directory import RunDirectory

    given = {"pairs": pairs, "scenarios": scenarios, "model": model}
    study = load_study(config, overrides={field: value for field, value in given.items() if value is not None})
    from batch_jobs.design.print_check import print_check
    from batch_jobs.design.study_check import check_study

    runs = RunDirectory.for_config(config, out).path.parent
    found = check_study(study, runs=runs, tokens_per_second=tokens_per_second)
    print_check(found, Console())
    raise typer.Exit(found.exit_code)


@app.command("power")
def power(
    config: Annotated[Path | None, typer.Argument(help="The study's YAML; options replace its numbers.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each condition.")] = None,
    alphas: Annotated[
        int | None, typer.Option(min=1, help="α besides 0; half of them below 0, if there is no config.")
    ] = None,
    scenarios: Annotated[
        int | None, typer.Option(min=1, help="Trends: scenarios, times layers, times directions.")
    ] = None,
    low: Annotated[float, typer.Option("--from", min=0, max=1, help="Rate at the lower end of the rise.")] = 0.3,
    high: Annotated[float, typer.Option("--to", min=0, max=1, help="Rate at the upper end.")] = 0.7,
    level: Annotated[float, typer.Option(min=0, max=1, help="Significance level, one-sided.")] = 0.05,
) -> None:
    """Say how likely a grid is to show a given rise of the rate, in one condition and in the trend over α."""
    from rich.console import Console

    from batch_jobs.config.study import StudyError, load_study
    from batch_jobs.design.power import design_power
    from batch_jobs.design.print_check import print_power
    from batch_jobs.design.study_check import grid_of

    if config is None and (samples is None or alphas is None):
        raise StudyError("there is no config and --samples or --alphas is missing; give CONFIG, or both numbers.")
    shape = grid_of(load_study(config)) if config is not None else None
    print_power(
        design_power(
            samples or (shape.samples if shape else 1),
            alphas + 1 if alphas else shape.alphas if shape else 2,
            scenarios or (shape.groups if shape else 1),
            below_zero=shape.below_zero if shape and not alphas else None,
            low=low,
            high=high,
            level=level,
        ),
        Console(),
    )


@app.command("init")
def init(
    name: Annotated[str, typer.Argument(help="Name of the study; the file is NAME.yaml in the current folder.")],
) -> None:
    """Write a commented study config that runs as it is, on the demo model."""
    from batch_jobs.config.shipped import write_study_config

    path = write_study_config(name, Path())
    print(f"{path} written; edit it, then run: vllm-steer study run {path}")


app.command("score")(grades.score)
app.command("judge")(grades.judge)
app.command("labels")(grades.labels)


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories: of one its report is written anew.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Page of several runs; its figures go to a folder beside it.", show_default="runs.html"),
    ] = None,
) -> None:
    """Write the report of a run anew, or one page that sets several runs side by side. Nothing is scored again."""
    from batch_jobs.report.page import write_report
    from batch_jobs.report.several_runs import write_joint_report

    if len(runs) == 1 and out is None:
        print(write_report(runs[0]))
    else:
        print(write_joint_report(runs, out or Path("runs.html")))


@app.command("compare")
def compare(
    run_a: Annotated[str, typer.Argument(help="A run directory: a folder or an address.")],
    run_b: Annotated[str, typer.Argument(help="Another one: same model or another, same texts or others.")],
    out: Annotated[Path | None, typer.Option(help="Also write the comparison as JSON.")] = None,
) -> None:
    """Set two runs side by side: configs, equal completions, success rates, validation, agreement of projections."""
    from dataclasses import replace

    from rich.console import Console

    from batch_jobs.compare.runs import compare_runs, write_comparison
    from batch_jobs.compare.tables import print_comparison
    from batch_jobs.files.documents import printable
    from batch_jobs.run.open_run import open_run

    with open_run(run_a) as one, open_run(run_b) as other:
        comparison = compare_runs(one.path, other.path)
        comparison = replace(
            comparison,
            a=replace(comparison.a, path=printable(one.shown(one.path))),
            b=replace(comparison.b, path=printable(other.shown(other.path))),
        )
    print_comparison(comparison, Console())
    if out is not None:
        write_comparison(out, comparison)
