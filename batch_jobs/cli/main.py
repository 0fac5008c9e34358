"""The command `vllm-steer`. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from batch_jobs.cli import doctor, pairs, study
from vllm_steer import Steering
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


@app.command("score")
def score(
    raw: Annotated[
        Path, typer.Option(help="Steered generations as the paper's authors publish them: layer, scenario, α, samples.")
    ],
    out: Annotated[Path, typer.Option(help="CSV to write, a row a model, layer and scenario.")],
) -> None:
    """Score published generations by the paper's metric, and by the corrected one beside it."""
    from batch_jobs.scoring.published_generations import score_raw

    print(score_raw(raw, out))


@app.command("serve", context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS] [VLLM FLAGS]")
def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, local path or demo-model; first, or in the --config YAML. Whatever else is no option below "
            "goes to vLLM's server as it is.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The server's YAML, e.g. configs/servers/demo.yaml; options here win over it.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to hook, e.g. 8,12.", show_default="those of the directions")
    ] = None,
    directions: Annotated[list[Path] | None, typer.Option(help="Direction file; may be given again.")] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=direction:alpha[@layer]: a model name that is steered; the same name again adds to it."
        ),
    ] = None,
    playground: Annotated[
        bool | None, typer.Option("--playground/--no-playground", help="Serve the page to try directions on.")
    ] = None,
    registry_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps directions put over HTTP for the next start.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(help="Key for changing directions over HTTP.", envvar="VLLM_STEER_ADMIN_KEY", show_envvar=True),
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the command instead of running it.")] = False,
) -> None:
    """Serve a model over OpenAI's API, steered: vLLM's own server with the plugin switched on."""
    from batch_jobs.cli.serve import server_command
    from batch_jobs.config.server import load_server_config, parse_alias, parse_layers

    words = arguments or []
    model, passed_on = (words[:1], words[1:]) if words and not words[0].startswith("-") else ([], words)
    aliases: dict[str, list[Steering]] = {}
    for name, entry in map(parse_alias, alias or ()):
        aliases.setdefault(name, []).append(entry)
    options = {
        "model": model[0] if model else None,
        "layers": None if layers is None else parse_layers(layers),
        "directions": [str(file.resolve()) for file in directions or ()],
        "served_aliases": aliases,
        "playground": playground,
        "registry_dir": None if registry_dir is None else str(registry_dir.resolve()),
    }
    given = {name: value for name, value in options.items() if value not in (None, [], {})}
    command = server_command(load_server_config(config, given), passed_on, admin_key)
    if show:
        print(command.shown())
    else:
        command.run()


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="Directions: .safetensors, .gguf or .npy.")],
    target: Annotated[Path, typer.Argument(help="File to write: .safetensors or .gguf.")],
    name: Annotated[str | None, typer.Option(help="Name of the direction; a .npy file holds none.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Layer of the direction; a .npy file holds none.")] = None,
) -> None:
    """Write directions in another file format, unchanged."""
    from vllm_steer import load_directions, save_directions

    directions = load_directions(source, name=name, layer=layer)
    save_directions(target, directions)
    for direction in directions:
        print(f"{direction.key} {direction.content_hash}")


@app.command("demo")
def demo(
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/demo")] = None,
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
