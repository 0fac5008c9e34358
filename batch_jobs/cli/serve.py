"""`vllm-steer serve`: vLLM's own server with the plugin switched on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_steer import Steering


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
    directions: Annotated[
        list[str] | None, typer.Option(help="Direction file or folder, or hf://…; may be given again.")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=direction:alpha[@layer][;op=...;span=...]: a steered model name; the same name again, or "
            "a comma, adds to it."
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
    from batch_jobs.cli.server_command import server_command
    from batch_jobs.config.server import load_server_config, parse_alias, parse_layers
    from vllm_steer.settings import direction_location

    words = arguments or []
    model, passed_on = (words[:1], words[1:]) if words and not words[0].startswith("-") else ([], words)
    aliases: dict[str, list[Steering]] = {}
    for name, entries in map(parse_alias, alias or ()):
        aliases.setdefault(name, []).extend(entries)
    options = {
        "model": model[0] if model else None,
        "layers": None if layers is None else parse_layers(layers),
        "directions": [direction_location(file) for file in directions or ()],
        "served_aliases": aliases,
        "playground": playground,
        "registry_dir": None if registry_dir is None else str(registry_dir.resolve()),
    }
    given = {name: value for name, value in options.items() if value not in (None, [], {})}
    command = server_command(load_server_config(config, given), passed_on, admin_key)
    for remark in command.remarks:
        print(f"vllm-steer: {remark}", file=sys.stderr)
    if show:
        print(command.shown())
    else:
        command.run()
