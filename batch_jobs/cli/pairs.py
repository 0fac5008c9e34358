"""`vllm-steer pairs`: make contrastive pairs, and look at what they give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Contrastive pairs: the texts that directions are made from.", no_args_is_help=True)


@app.command("generate")
def generate(
    out: Annotated[Path, typer.Option(help="JSONL file to write, or to go on with.")],
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="MODEL@URL#VARIABLE of an OpenAI-compatible server; several take turns."),
    ] = None,
    local: Annotated[
        str | None, typer.Option(help="A model that this machine's vLLM runs; takes a turn as well.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Pairs for each scenario.")] = 10,
    scenarios: Annotated[Path | None, typer.Option(help="Scenarios: a JSON file.", show_default="bundled")] = None,
    system_prompts: Annotated[
        Path | None, typer.Option(help="The two system prompts: a JSON file.", show_default="bundled")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest text, the model's thought included.")] = 600,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help="Variables for the chat template of --local, as a JSON object, e.g. '{\"enable_thinking\": false}'.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time to an endpoint.")] = 4,
    max_attempts: Annotated[int, typer.Option(min=1, help="Draws of a pair whose texts are unusable.")] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write pairs: the same scenario under a positive and under a task-focused system prompt, models in rotation.

    Run again, it goes on where it stopped.
    """
    from rich.console import Console

    from batch_jobs.config.template_variables import parse_template_variables
    from batch_jobs.errors import StudyError
    from batch_jobs.pairs.source import generate_pairs, load_system_prompts
    from batch_jobs.pairs.writer import open_writers
    from batch_jobs.texts.contrastive import load_scenarios

    if chat_template_kwargs is not None and local is None:
        raise StudyError("--chat-template-kwargs is for the model of --local; add --local MODEL, or leave it out.")
    writers = open_writers(
        endpoint or [],
        local,
        temperature=temperature,
        max_tokens=max_tokens,
        concurrency=concurrency,
        template_variables=parse_template_variables(chat_template_kwargs or "{}", "--chat-template-kwargs"),
    )
    with writers as models:
        made = generate_pairs(
            out,
            models,
            load_scenarios(scenarios),
            load_system_prompts(system_prompts),
            runs=runs,
            seed=seed,
            max_attempts=max_attempts,
            console=Console(stderr=True),
        )
    print(f"{made.written} pairs written, {made.reused} there before, {len(made.given_up)} given up: {out}")
    for pair in made.given_up:
        print(f"{pair.pair_id}: {pair.source_model}: {pair.complaint}")
    if made.given_up:
        raise typer.Exit(1)


@app.command("check")
def check(
    pairs: Annotated[
        Path | None,
        typer.Argument(
            help="A .jsonl file, or a folder with train_pairs.jsonl and test_pairs.jsonl.",
            show_default="those of --config, else bundled",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A study's YAML, for its pairs and its concept's keywords.", show_default="empathy"),
    ] = None,
) -> None:
    """Look for duplicates, uneven lengths and words that give the class away. Exit code 1 when there are problems."""
    from rich.console import Console

    from batch_jobs.config.study import load_study
    from batch_jobs.pairs.check import check_pairs
    from batch_jobs.pairs.summary import print_pair_report
    from batch_jobs.texts.contrastive import load_pairs

    study = load_study(config) if config else None
    source = study.pairs if study and pairs is None else pairs
    report = check_pairs(load_pairs(source), study.concept if study else None)
    print_pair_report(report, Console())
    raise typer.Exit(report.exit_code)
