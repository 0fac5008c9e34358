"""`vllm-steer doctor`: whether a model can be steered, without its weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_steer import Diagnosis

Unproven = Literal["refuse", "experiment"]
REFUSED_EXIT_CODE = 1
PROOFS = {
    "parity": "parity: steering and readout of these layers were compared with Hugging Face",
    "experiment": "experiment only: a small random copy says how these layers return the stream",
    "unknown": "unknown: never compared with Hugging Face under this name",
    "refused": "refused",
}


def doctor(
    model: Annotated[str, typer.Argument(help="Local folder, hub id or demo-model; only its config is read.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers to hook, e.g. 8,12.", show_default="those of the directions, or all")
    ] = None,
    directions: Annotated[
        list[str] | None, typer.Option(help="Direction file or folder, or hf://…; may be given again.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Also run the experiment of an engine's start on a small random copy.")
    ] = False,
    unproven_model: Annotated[
        Unproven, typer.Option(help="As in steer_config: what to do with a model that was never compared.")
    ] = "refuse",
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Say whether an engine of a model would start with steering, and why not. Exit code 1 if it would be refused."""
    import json

    from rich.console import Console

    from batch_jobs.config.server import parse_layers
    from batch_jobs.engine.start_engine import model_location, set_engine_environment

    hooked = None if layers is None else parse_layers(layers)
    set_engine_environment()
    from vllm_steer import diagnose

    diagnosis = diagnose(
        model_location(model), layers=hooked, directions=directions or (), unproven_model=unproven_model, run=run
    )
    if as_json:
        print(json.dumps({"is_fit": diagnosis.is_fit, **asdict(diagnosis)}, indent=2))
    else:
        print_diagnosis(diagnosis, Console())
    if not diagnosis.is_fit:
        raise typer.Exit(REFUSED_EXIT_CODE)


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The answers as a table, a row a question."""
    from rich.table import Table
    from rich.text import Text

    answers = {
        "architecture": diagnosis.architecture,
        "vLLM's class": diagnosis.model_class,
        "decoder layers": "\n".join(diagnosis.layer_classes) or "known once it is loaded, or with --run",
        "proof": PROOFS[diagnosis.proof],
        "layers": f"{diagnosis.num_layers}, 0 to {diagnosis.num_layers - 1}",
        "hidden size": str(diagnosis.hidden_size),
        "dtype": diagnosis.dtype,
        "model runner": diagnosis.runner,
        "hooked layers": ", ".join(map(str, diagnosis.layers)),
        "directions": ", ".join(diagnosis.directions) or "none given",
        "not together with": "\n".join(diagnosis.refused_features),
        "not for": "\n".join(diagnosis.refused_requests),
    }
    table = Table(show_header=False, title=diagnosis.model)
    for question, answer in answers.items():
        table.add_row(question, Text(answer))
    table.add_section()
    verdict = Text("\n".join(diagnosis.problems), "red") if diagnosis.problems else Text("yes", "green")
    table.add_row("can be steered", verdict)
    console.print(table)
