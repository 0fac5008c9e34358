"""`vllm-steer study`: run a study, score it anew, have it judged, compare two runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

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

    study = load_study(config, overrides=overrides)
    # after the config is known to be good: this import brings scikit-learn and pyarrow
    from batch_jobs.pipeline import RunOptions, run_study
    from batch_jobs.print_summary import print_summary
    from batch_jobs.run.open_run import open_run
    from batch_jobs.run.run_directory import RunDirectory

    given = RunOptions(**options)
    place = RunDirectory.for_config(config, None).path if out is None else out
    with open_run(place, drives=True, fetch=not given.overwrite) as directory:
        result = run_study(study, directory, given, console=Console(stderr=True))
        print_summary(result, study.concept, Console())


@app.command("init")
def init(
    name: Annotated[str, typer.Argument(help="Name of the study; the file is NAME.yaml in the current folder.")],
) -> None:
    """Write a commented study config that runs as it is, on the demo model."""
    from batch_jobs.config.shipped import write_study_config

    path = write_study_config(name, Path())
    print(f"{path} written; edit it, then run: vllm-steer study run {path}")


@app.command("score")
def score(
    run_directory: Annotated[str, typer.Argument(help="What `study run` wrote: a folder or an address.")],
) -> None:
    """Score a run again from its Parquet files, judge's grades included, and write its report anew. No engine."""
    from batch_jobs.directions.validation_file import read_validation
    from batch_jobs.pipeline import score_run
    from batch_jobs.report.page import write_report
    from batch_jobs.run.open_run import open_run
    from batch_jobs.texts.contrastive import load_scenarios

    with open_run(run_directory) as run:
        score_run(run, load_scenarios(run.scenarios), read_validation(run.validation))
        report = write_report(run.path)
        run.publish()
        print(run.shown(report))


@app.command("judge")
def judge(
    run_directory: Annotated[str, typer.Argument(help="What `study run` wrote: a folder or an address.")],
    endpoint: Annotated[
        str, typer.Option(help="MODEL@URL#VARIABLE; VARIABLE names the environment variable with the API key.")
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest reply, the judge's thought before the digit included.")
    ] = 1024,
) -> None:
    """Have a language model grade every completion 0, 1 or 2 by its scenario's rubric; then `study score` again.

    Exit code 1 when rows are left without a grade; run again, it asks for those alone.
    """
    from rich.console import Console

    from batch_jobs.endpoint.chat import ChatClient, Endpoint
    from batch_jobs.run.open_run import open_run
    from batch_jobs.scoring.judge import judge_rows
    from batch_jobs.texts.contrastive import load_scenarios

    with open_run(run_directory, drives=True, keep_publishing=True) as run:
        with ChatClient(Endpoint.parse(endpoint)) as client:
            try:
                summary = judge_rows(
                    run.generations,
                    load_scenarios(run.scenarios),
                    client,
                    run.judgements,
                    concurrency=concurrency,
                    console=Console(stderr=True),
                    max_tokens=max_tokens,
                )
            finally:
                run.publish()  # the grades so far
        judgements = run.shown(run.judgements)
    counts = f"{summary.graded} graded, {summary.reused} there before, {len(summary.ungraded)} without a grade"
    print(f"{counts}: {judgements}")
    for scenario, rows in summary.without_rubric.items():
        print(f"{scenario}: {rows} rows not judged, it has no rubric")
    for reason, rows in summary.reasons.items():
        row_id, first = next((row_id, one) for row_id, one in summary.ungraded.items() if one.reason == reason)
        print(f"{rows} rows {reason}, e.g. {row_id}: {first.detail[:200]!r}")
    if summary.ungraded:
        print(
            f"{len(summary.ungraded)} rows have no grade. Run the same command again to ask for these alone, with a "
            "larger --max-tokens where the token limit cut replies off."
        )
        raise typer.Exit(1)


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
