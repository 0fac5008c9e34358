"""Runs a capture: shards that are finished are kept, the others are read in one engine or in a pool of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from batch_jobs.capture.folder import CaptureFolder
from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.shard_file import BATCH_ROWS, capture_shard
from batch_jobs.capture.shards import Counts, TextShard, text_shards
from batch_jobs.capture.texts import read_texts
from batch_jobs.engine.progress import ConsoleProgress, Progress
from batch_jobs.engine.start_engine import Engine, set_engine_environment
from batch_jobs.errors import StudyError
from batch_jobs.generate.ray_options import Pool


@dataclass(frozen=True)
class Captured:
    """What a capture has written.

    Attributes:
        shards, rows: of the whole capture.
        reused: how many of the shards were there before.
        counts: what became of the texts.
    """

    shards: int
    rows: int
    reused: int
    counts: Counts


def capture(
    texts: Path,
    settings: CaptureSettings,
    out: Path,
    *,
    console: Console,
    pool: Pool | None = None,
    quiet: bool = False,
    tokenizer: Any = None,
) -> Captured:
    """Read all texts and write their shards; goes on where an earlier call with the same settings stopped.

    Args:
        texts: the file of texts.
        settings: the capture's settings.
        out: the folder of the shards.
        console: for progress.
        pool: the engines of a Ray pool; None for one engine in this process.
        quiet: show no progress.
        tokenizer: the model's; None loads it.

    Raises:
        StudyError: the texts or the folder cannot be used, or a shard cannot be written.
        SteerError: the engine cannot read such rows.
    """
    if tokenizer is None:
        tokenizer = _tokenizer(settings)
    folder, counts = CaptureFolder(out), Counts()
    num_texts = sum(1 for _ in read_texts(texts, settings.column))  # every text is looked at before an engine starts
    if not num_texts:
        raise StudyError(f"{texts}: holds no texts; give at least one.")
    with folder.open(settings) as records:
        known = folder.finished()
        total = [0, 0, 0]  # shards, rows, reused

        def unfinished() -> Iterator[TextShard]:
            for shard in text_shards(read_texts(texts, settings.column), tokenizer, settings, counts):
                record = known.get(shard.number)
                if record is not None and folder.is_finished(shard, record, settings.digest):
                    total[0], total[1], total[2] = total[0] + 1, total[1] + record["rows"], total[2] + 1
                else:
                    yield shard

        def done(record: dict[str, Any]) -> None:
            records.append(record)
            total[0], total[1] = total[0] + 1, total[1] + record["rows"]
            if not quiet:
                line = f"Shard {record['shard']}: {record['rows']} rows of {record['texts']} texts"
                console.print(f"{line}; {total[0]} shards, {counts.read} of {num_texts} texts begun", highlight=False)

        if pool is None:
            _in_one_engine(unfinished(), settings, out, done, ConsoleProgress(console, quiet))
        else:
            from batch_jobs.capture.ray_pool import in_ray_pool

            in_ray_pool(unfinished(), settings, out.resolve(), done, pool)
    return Captured(total[0], total[1], total[2], counts)


def start_capture_engine(settings: CaptureSettings) -> Engine:
    """Load the model with hooks on the layers to read, and room for the rows of a batch.

    Raises:
        SteerError: the model's family is not supported, or it lacks a layer.
        StudyError: the model's config cannot be read.
    """
    set_engine_environment()
    row_bytes = 4 * _hidden_size(settings) * len(settings.layers)
    # Those of a batch wait until all its texts are read; a text may hold twice its rows while it grows.
    store = math.ceil(2 * (BATCH_ROWS + settings.most_rows) * row_bytes / 2**20) + 16
    from vllm_steer import load_llm

    engine: Engine = load_llm(
        settings.model,
        layers=settings.layers,
        dtype=settings.engine_dtype,
        max_model_len=settings.max_text_tokens + settings.generate,
        disable_log_stats=False,  # progress comes from the statistics
        steer={**settings.engine.steer_settings(), "max_rows": settings.max_rows, "readout_store_mib": store},
        **settings.engine.engine_args(),
    )
    return engine


def _in_one_engine(
    shards: Iterable[TextShard],
    settings: CaptureSettings,
    out: Path,
    done: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> None:
    engine: Engine | None = None
    try:
        for shard in shards:
            if engine is None:  # a capture with nothing left to read starts none
                engine = start_capture_engine(settings)
            done(capture_shard(engine, settings, shard, out, progress=progress))
    finally:
        if engine is not None:
            from vllm_steer import close_llm

            close_llm(engine)


def _tokenizer(settings: CaptureSettings) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(settings.model, trust_remote_code=settings.engine.trust_remote_code)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"The tokenizer of {settings.model} cannot be read ({str(error).strip().splitlines()[0]}); give a model "
            "folder, a hub id that this machine can reach, or demo-model."
        ) from error


def _hidden_size(settings: CaptureSettings) -> int:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=settings.engine.trust_remote_code)
        return int(config.get_text_config().hidden_size)
    except (OSError, ValueError, AttributeError) as error:
        raise StudyError(
            f"The config of {settings.model} does not give a hidden size ({str(error).strip().splitlines()[0]}); give "
            "a decoder-only language model."
        ) from error
