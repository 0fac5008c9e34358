"""`vllm-steer capture`: the residual stream of every token of many texts, to files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from batch_jobs.cli.pool_options import Address, CpusPerWorker, Executor, ExecutorName, GpusPerWorker, Workers, pool_of


class FileDtypeName(StrEnum):
    """Dtype of the rows in the files."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class SpanName(StrEnum):
    """The tokens to read."""

    PROMPT = "prompt"
    ALL = "all"


def capture(
    model: Annotated[str, typer.Argument(help="Local folder, hub id, or demo-model.")],
    texts: Annotated[Path, typer.Argument(help="A .txt file with one text a line, or a .jsonl or .parquet file.")],
    layers: Annotated[str, typer.Option(help="Layers to read, e.g. 8,12.")],
    out: Annotated[Path, typer.Option(help="Folder to write, or to go on with.")],
    column: Annotated[str, typer.Option(help="Field or column with the text, in .jsonl and .parquet files.")] = "text",
    span: Annotated[
        SpanName, typer.Option(help="prompt: each text's tokens. all: also those generated after it.")
    ] = SpanName.PROMPT,
    skip_first: Annotated[int, typer.Option(min=0, help="Tokens at the start of each text to leave out.")] = 0,
    max_text_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are cut to this many tokens.")] = 1024,
    generate: Annotated[int, typer.Option(min=1, help="Tokens to generate after each text, with --span all.")] = 1,
    dtype: Annotated[FileDtypeName, typer.Option(help="Dtype of the rows in the files.")] = FileDtypeName.FLOAT32,
    shard_rows: Annotated[int, typer.Option(min=1, help="Most rows of a file; a text is never split.")] = 16384,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Most rows times layers of one text.", show_default="what a text can have"),
    ] = None,
    engine_dtype: Annotated[str, typer.Option(help="Dtype of the model: auto, float32, bfloat16 or float16.")] = "auto",
    engine: Annotated[
        str | None,
        typer.Option(
            help="Further options of the engine as JSON, the fields of a study's `engine`.", show_default="{}"
        ),
    ] = None,
    executor: Executor = ExecutorName.LOCAL,
    workers: Workers = 1,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    address: Address = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, for logs.")] = False,
) -> None:
    """Write every token's residual stream to safetensors shards, with its token, text and position.

    Run again, it goes on where it stopped. A folder of a capture with other settings is refused.
    """
    import json

    from rich.console import Console

    from batch_jobs.capture.run_capture import capture as run
    from batch_jobs.capture.settings import CaptureSettings
    from batch_jobs.capture.texts import sha256_of
    from batch_jobs.config.server import parse_layers
    from batch_jobs.engine.start_engine import model_location, model_revision
    from batch_jobs.errors import StudyError

    pool = pool_of(executor, workers, gpus_per_worker, cpus_per_worker, address)
    try:
        engine_options = json.loads(engine or "{}")
    except ValueError as error:
        raise StudyError(f"--engine is {engine!r}, not JSON ({error}); give an object of engine options.") from error
    location = model_location(model)
    settings = CaptureSettings.parse(
        {
            "model": location,
            "model_revision": model_revision(location, None),
            "texts_sha256": sha256_of(texts),
            "column": column,
            "layers": sorted(set(parse_layers(layers))),
            "span": span.value,
            "skip_first": skip_first,
            "max_text_tokens": max_text_tokens,
            "generate": generate,
            "dtype": dtype.value,
            "shard_rows": shard_rows,
            "max_rows": max_rows,
            "engine_dtype": engine_dtype,
            "engine": engine_options,
        }
    )
    made = run(texts, settings, out, console=Console(stderr=True), pool=pool, quiet=quiet)
    print(f"{made.rows} rows in {made.shards} shards, {made.reused} of them there before: {out}")
    if made.counts.cut:
        print(f"{made.counts.cut} of {made.counts.read} texts were cut to {max_text_tokens} tokens")
    if made.counts.short:
        shown = ", ".join(map(str, made.counts.short[:5]))
        print(f"{len(made.counts.short)} texts have no more than {skip_first} tokens and were left out, e.g. {shown}")
