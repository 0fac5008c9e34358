"""Cuts the texts of a capture into shards: the texts whose rows one file holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.texts import SourceText
from batch_jobs.texts.prompts import text_prompt


class TokenText(NamedTuple):
    """A text as token ids.

    Attributes:
        place: see ``SourceText``.
        token_ids: its tokens, with the special ones that the tokenizer adds, cut to ``max_text_tokens``.
    """

    place: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TextShard:
    """The texts of one file.

    Attributes:
        number: the shard's place, from 0.
        texts: its texts, in the order of the file of texts.
    """

    number: int
    texts: tuple[TokenText, ...]

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"shard-{self.number:05d}.safetensors"


@dataclass
class Counts:
    """What became of the texts so far: ``read`` are in shards, ``cut`` of these were too long, ``short`` are left out
    because ``skip_first`` leaves no token of them."""

    read: int = 0
    cut: int = 0
    short: list[int] = field(default_factory=list)


def text_shards(
    texts: Iterable[SourceText], tokenizer: Any, settings: CaptureSettings, counts: Counts
) -> Iterator[TextShard]:
    """Yield the shards, each as soon as its texts are known. The cuts depend on texts and settings alone.

    Args:
        texts: all texts.
        tokenizer: the model's Hugging Face tokenizer.
        settings: the capture's settings.
        counts: is kept up to date.
    """
    pending: list[TokenText] = []
    rows, number = 0, 0
    for place, text in texts:
        ids = text_prompt(tokenizer, text, max_tokens=settings.max_text_tokens + 1).token_ids
        own = settings.rows_of(len(ids[: settings.max_text_tokens]))
        if not own:
            counts.short.append(place)
            continue
        if pending and rows + own > settings.shard_rows:
            yield TextShard(number, tuple(pending))
            pending, rows, number = [], 0, number + 1
        counts.read += 1
        counts.cut += len(ids) > settings.max_text_tokens
        pending.append(TokenText(place, ids[: settings.max_text_tokens]))
        rows += own
    if pending:
        yield TextShard(number, tuple(pending))
