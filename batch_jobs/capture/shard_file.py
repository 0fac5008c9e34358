"""Reads the rows of a shard's texts with the engine and writes its file.

A file holds ``layer.N`` (rows, D) for each layer, and one number a row in ``token_ids`` (int32), ``text_index`` (int64,
the text's place in the file of texts) and ``position`` (int32, the token's place in its text and what was generated).

Letters of shapes: R rows of the shard, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from batch_jobs.capture.folder import METADATA_KEY
from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.shards import TextShard, TokenText
from batch_jobs.engine.progress import Progress, Work
from batch_jobs.engine.start_engine import Engine
from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import atomic_file

BATCH_ROWS = 8192
"""Rows read at a time, so that the engine holds only a part of a shard. More would not fill its batches better."""


def capture_shard(
    engine: Engine, settings: CaptureSettings, shard: TextShard, folder: Path, *, progress: Progress
) -> dict[str, Any]:
    """Read all texts of a shard and write its file; returns the record of the finished shard.

    Raises:
        StudyError: the engine gives no readout, or a row does not fit into the files' dtype.
        SteerError: the engine refuses the readout.
    """
    import torch

    dtype = getattr(torch, settings.dtype)
    parts_RD: dict[int, list[Any]] = {layer: [] for layer in settings.layers}
    ids: list[int] = []
    text_index: list[int] = []
    position: list[int] = []
    for batch in _batches(shard.texts, settings):
        for text, token_ids, rows in _read(engine, settings, batch, f"Shard {shard.number}", progress):
            for layer in settings.layers:
                parts_RD[layer].append(_converted(torch.from_numpy(rows[layer]), dtype, layer, text))
            own = token_ids[settings.skip_first :][: len(rows[settings.layers[0]])]
            ids += own
            text_index += [text.place] * len(own)
            position += range(settings.skip_first, settings.skip_first + len(own))
    tensors = {}
    for layer in settings.layers:
        tensors[f"layer.{layer}"] = torch.cat(parts_RD.pop(layer))  # one layer at a time, and its parts go
    tensors["token_ids"] = torch.tensor(ids, dtype=torch.int32)
    tensors["text_index"] = torch.tensor(text_index, dtype=torch.int64)
    tensors["position"] = torch.tensor(position, dtype=torch.int32)
    path = folder / shard.file_name
    _write(path, tensors, {"digest": settings.digest, "shard": shard.number, "model": settings.model})
    return {
        "shard": shard.number,
        "file": shard.file_name,
        "first_text": shard.texts[0].place,
        "texts": len(shard.texts),
        "rows": len(ids),
        "bytes": path.stat().st_size,
    }


def _batches(texts: Sequence[TokenText], settings: CaptureSettings) -> Iterator[list[TokenText]]:
    batch: list[TokenText] = []
    rows = 0
    for text in texts:
        own = settings.rows_of(len(text.token_ids))
        if batch and rows + own > BATCH_ROWS:
            yield batch
            batch, rows = [], 0
        batch.append(text)
        rows += own
    yield batch


def _read(
    engine: Engine, settings: CaptureSettings, batch: Sequence[TokenText], title: str, progress: Progress
) -> Iterator[tuple[TokenText, list[int], Any]]:
    """Each text, the ids of its tokens and of those generated, and its rows by layer."""
    from vllm_steer import Readout, collect_readouts, steered

    readout = Readout(settings.layers, settings.span, skip_first=settings.skip_first, pool="rows")
    params = steered({"max_tokens": settings.generate, "temperature": 0.0}, [], readout=readout)
    tokens = sum(len(text.token_ids) for text in batch)
    with progress.watch(engine, title, Work(len(batch), tokens, settings.generate)):
        outputs = engine.generate(
            [{"prompt_token_ids": list(text.token_ids)} for text in batch], [params] * len(batch), use_tqdm=False
        )
    for text, output, (read,) in zip(batch, outputs, collect_readouts(engine, outputs), strict=True):
        ids = [*text.token_ids, *output.outputs[0].token_ids]
        end = len(text.token_ids) if settings.span == "prompt" else len(ids) - 1
        if read is None or read.num_tokens != end - settings.skip_first:
            got = "no rows" if read is None else f"{read.num_tokens} rows"
            raise StudyError(
                f"The engine returned {got} for text {text.place}, which has {end - settings.skip_first}; run the same "
                "command again."
            )
        yield text, ids, read.rows


def _converted(rows_ND: Any, dtype: Any, layer: int, text: TokenText) -> Any:
    import torch

    converted_ND = rows_ND.to(dtype)
    if dtype == torch.float16 and bool((converted_ND.isinf() & rows_ND.isfinite()).any()):
        raise StudyError(
            f"A row of text {text.place} at layer {layer} has an element of {float(rows_ND.abs().max()):.6g}, and "
            "float16 goes up to 65504; use --dtype bfloat16 or float32."
        )
    return converted_ND


def _write(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    with atomic_file(path) as part:
        save_file(tensors, part, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})
