"""The commands of `vllm-steer study` that grade a run's completions and score it anew: judge, labels, score."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from batch_jobs.endpoint.chat import Endpoint
    from batch_jobs.run.run_directory import RunDirectory
    from batch_jobs.scoring.judge import JudgeSummary

RunArgument = Annotated[str, typer.Argument(help="What `study run` wrote: a folder or an address.")]


def score(
    run_directory: RunArgument,
    judge: Annotated[
        str | None, typer.Option(help="Judge or person whose grades are the outcome, from now on.", metavar="NAME")
    ] = None,
    grades: Annotated[
        Path | None, typer.Option(help="File of `judge --out` whose grades are the outcome, this time.")
    ] = None,
) -> None:
    """Score a run again from its Parquet files, grades included, and write its report anew. No engine."""
    from batch_jobs.config.concept import concept_of_run
    from batch_jobs.directions.stored_validation import recorded_validation
    from batch_jobs.errors import StudyError
    from batch_jobs.pipeline import not_judged_yet, score_run
    from batch_jobs.report.page import write_report
    from batch_jobs.run.open_run import open_run
    from batch_jobs.scoring.rater_agreement import agreement_lines, read_agreement
    from batch_jobs.texts.contrastive import load_scenarios

    if judge is not None and grades is not None:
        raise StudyError("--judge and --grades both name the outcome; give one of them.")
    with open_run(run_directory) as run:
        concept = concept_of_run(run.read_provenance())
        scenarios, validation = load_scenarios(run.scenarios), recorded_validation(run)
        scores = score_run(run, scenarios, validation, concept, judge=judge, grades_file=grades)
        if note := not_judged_yet(run, concept, scores):
            print(note)
        if run.agreement.exists():
            print("\n".join(agreement_lines(read_agreement(run.agreement))))
        report = write_report(run.path)
        run.publish()
        print(run.shown(report))


def judge(
    run_directory: RunArgument,
    endpoint: Annotated[
        list[str],
        typer.Option(
            help="MODEL@URL#VARIABLE; VARIABLE names the environment variable with the API key. Repeat it for several "
            "judges."
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name of the judge, one for each endpoint.", show_default="its model"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the grades to this file and leave the run unchanged.", show_default="judgements/<name>.jsonl"
        ),
    ] = None,
    frame: Annotated[
        Path | None,
        typer.Option(
            help="Text file with the judge's question; {situation} {answer} {none} {some} {full} stand for its parts.",
            show_default="the study's, else the built-in one",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest reply, the judge's thought before the digit included.")
    ] = 1024,
) -> None:
    """Have language models grade every completion 0, 1 or 2 by its scenario's rubric; then `study score` again.

    Exit code 1 when rows are left without a grade; run again, it asks for those alone.
    """
    from rich.console import Console

    from batch_jobs.endpoint.chat import ChatClient, Endpoint
    from batch_jobs.files.documents import read_text
    from batch_jobs.run.open_run import open_run
    from batch_jobs.scoring.judge import judge_rows
    from batch_jobs.scoring.judge_frame import frame_of_run
    from batch_jobs.texts.contrastive import load_scenarios

    endpoints = [Endpoint.parse(text) for text in endpoint]
    ungraded = 0
    with ExitStack() as stack:
        run = stack.enter_context(open_run(run_directory, drives=True, keep_publishing=True))
        files = _judge_files(run, endpoints, name or [], out)
        scenarios = load_scenarios(run.scenarios)
        asked = read_text(frame, advice="give a text file") if frame else frame_of_run(run.read_provenance())
        # all clients before the first call, so that a key that is not set costs nothing
        judges = [stack.enter_context(ChatClient(one)) for one in endpoints]
        stack.callback(run.publish)  # the grades so far
        for client, file in zip(judges, files, strict=True):
            summary = judge_rows(
                run.generations,
                scenarios,
                client,
                file,
                concurrency=concurrency,
                console=Console(stderr=True),
                max_tokens=max_tokens,
                frame=asked,
            )
            _print_summary(summary, file if out else run.shown(file))
            ungraded += len(summary.ungraded)
    if ungraded:
        print(
            f"{ungraded} rows have no grade. Run the same command again to ask for these alone, with a "
            "larger --max-tokens where the token limit cut replies off."
        )
        raise typer.Exit(1)


def labels(
    run_directory: RunArgument,
    file: Annotated[
        Path | None, typer.Argument(help="CSV with the columns row_id and grade (0, 1, 2), and rater if several.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The person who gave the labels.", show_default="the file's name")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="Write a CSV of completions to label, blinded and shuffled, instead.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Completions in the template, drawn at random.")] = 50,
    seed: Annotated[int, typer.Option(help="Draws the template's completions and their order.")] = 0,
) -> None:
    """Take over people's labels of completions as another judge's grades; or write a sheet for people to fill in."""
    from batch_jobs.errors import StudyError
    from batch_jobs.run.open_run import open_run
    from batch_jobs.scoring.labels import import_labels, write_sheet
    from batch_jobs.texts.contrastive import load_scenarios

    if (file is None) == (template is None):
        raise StudyError("Give a CSV of labels to take over, or --template FILE to write one; one of the two.")
    with open_run(run_directory, drives=file is not None) as run:
        if template is not None:
            rows = write_sheet(template, run.generations, load_scenarios(run.scenarios), sample=sample, seed=seed)
            print(f"{rows} completions to label: {template}")
        elif file is not None:
            for rater, count in import_labels(run, file, name).items():
                print(f"{count} labels of {rater}")
            run.publish()


def _judge_files(run: RunDirectory, endpoints: list[Endpoint], names: list[str], out: Path | None) -> list[Path]:
    from batch_jobs.errors import StudyError
    from batch_jobs.scoring.judgements import grades_path, judge_name, rater_name

    if out is not None:
        if len(endpoints) > 1 or names:
            raise StudyError("--out is the file of one judge; give one --endpoint and no --name with it.")
        return [out]
    if names and len(names) != len(endpoints):
        raise StudyError(f"Got {len(names)} names for {len(endpoints)} endpoints; give one for each, or none.")
    chosen = [rater_name(name) for name in names] or [judge_name(endpoint.model) for endpoint in endpoints]
    if repeated := sorted({name for name in chosen if chosen.count(name) > 1}):
        raise StudyError(f"Two judges are named {repeated[0]}; give each --endpoint a --name of its own.")
    return [grades_path(run, name) for name in chosen]


def _print_summary(summary: JudgeSummary, file: object) -> None:
    print(f"{summary.graded} graded, {summary.reused} there before, {len(summary.ungraded)} without a grade: {file}")
    if summary.cut_off:
        print(f"{summary.cut_off} rows judged by what there is: sampling.max_tokens cut their completions off")
    for scenario, rows in summary.without_rubric.items():
        print(f"{scenario}: {rows} rows not judged, it has no rubric")
    for reason, rows in summary.reasons.items():
        row_id, first = next((row_id, one) for row_id, one in summary.ungraded.items() if one.reason == reason)
        print(f"{rows} rows {reason}, e.g. {row_id}: {first.detail[:200]!r}")
