"""The command `vllm-steer`. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from batch_jobs.cli import capture, doctor, harnesses, pairs, serve, study
from vllm_steer.errors import SteerError

USAGE_EXIT_CODE = 2

app = typer.Typer(
    name="vllm-steer",
    help="Find directions in a model's residual stream, steer with them in vLLM, score what comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(study.app, name="study")
app.add_typer(pairs.app, name="pairs")
app.command("doctor")(doctor.doctor)
app.command("capture")(capture.capture)
app.command("serve", context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS] [VLLM FLAGS]")(
    serve.serve
)
app.command("evaluate")(harnesses.evaluate)
# all words are lm-eval's, its --help too
app.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    options_metavar="[LM-EVAL OPTIONS]",
)(harnesses.lm_eval)


@app.command("score")
def score(
    out: Annotated[Path, typer.Option(help="CSV to write, a row a model, layer and scenario.")],
    raw: Annotated[
        Path | None,
        typer.Option(help="Steered generations as the paper's authors publish them: layer, scenario, α, samples."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="Generations of your own: a .parquet or .csv file with the columns alpha and completion."),
    ] = None,
) -> None:
    """Score generations: Δ with its interval, and the paper's success rate beside it."""
    from batch_jobs.errors import StudyError

    if raw is not None and table is None:
        from batch_jobs.scoring.published_generations import score_raw

        print(score_raw(raw, out))
    elif table is not None and raw is None:
        from batch_jobs.scoring.own_table import score_own_table

        print(score_own_table(table, out))
    else:
        raise StudyError("give the generations, either --raw FILE (the paper's form) or --table FILE (your own).")


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="Directions: a file or folder of any known writer, or hf://…")],
    target: Annotated[
        Path, typer.Argument(help="File to write: .safetensors, .gguf, .npy or .pt; or a folder, .repsteer.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the directions, in place of the file's own.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0, help="The one layer to read, as the file counts; of one vector without a layer, its layer."
        ),
    ] = None,
    layer_index: Annotated[
        Literal["block_output", "hidden_states"] | None,
        typer.Option(help="How the file counts layers, where its format does not say it."),
    ] = None,
    feature: Annotated[
        int | None, typer.Option(min=0, help="Feature of a sparse autoencoder; of a .csv file, the one to read.")
    ] = None,
) -> None:
    """Write directions in another file format, unchanged, and print what was taken."""
    from vllm_steer import load_directions, save_directions

    directions = load_directions(source, name=name, layer=layer, layer_index=layer_index, feature=feature)
    save_directions(target, directions)
    for direction in directions:
        about = " ".join(f"{field}={value}" for field, value in direction.metadata.items())
        print(f"{direction.key} {direction.content_hash} norm={direction.norm:.6g} {about}".rstrip())


@app.command("demo")
def demo(
    out: Annotated[
        str | None, typer.Option(help="Run directory: a folder or an address.", show_default="runs/demo")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, for logs.")] = False,
) -> None:
    """Run the demo study on the demo model, from contrastive pairs to a report: some minutes on two CPU cores."""
    from batch_jobs.config.shipped import DEMO_STUDY, shipped_configs

    study.run_config(shipped_configs() / DEMO_STUDY, out, {}, quiet=quiet)


@app.command("configs")
def configs(
    folder: Annotated[Path, typer.Argument(help="Folder to write them into.")] = Path("configs"),
) -> None:
    """Copy the configs of studies and servers that come with the package into a folder."""
    from batch_jobs.config.shipped import copy_configs

    for path in copy_configs(folder):
        print(path)


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
