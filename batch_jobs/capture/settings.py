"""What a capture reads, and how: everything that its shards depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batch_jobs.config.study import EngineOptions
from batch_jobs.errors import StudyError

FileDtype = Literal["float32", "float16", "bfloat16"]
Layer = Annotated[int, Field(ge=0)]


class CaptureSettings(BaseModel):
    """The settings of one capture. Two captures with equal settings write equal shards.

    Attributes:
        model: what the engine loads: a folder or a hub id.
        model_revision: for a folder a digest of its config and file sizes; None for a hub id.
        texts_sha256: digest of the file of texts.
        column: the field or column with the text, in a .jsonl or .parquet file.
        layers: decoder blocks to read, 0-based, by block output.
        span: ``prompt`` for the tokens of each text; ``all`` for those and the generated ones that were fed back.
        skip_first: tokens at the start of each text to leave out.
        max_text_tokens: longer texts are cut to this many tokens.
        generate: tokens to generate after each text, with ``all``; greedy.
        dtype: dtype of the rows in the files; they leave the engine as float32.
        shard_rows: most rows of a shard. A text is never split, so one with more has a shard of its own.
        max_rows: most rows times layers of one text, as the engine allows them.
        engine_dtype: dtype of the model.
        engine: further options of the engine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_revision: str | None
    texts_sha256: str
    column: str
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]
    span: Literal["prompt", "all"] = "prompt"
    skip_first: Annotated[int, Field(ge=0)] = 0
    max_text_tokens: Annotated[int, Field(ge=1)] = 1024
    generate: Annotated[int, Field(ge=1)] = 1
    dtype: FileDtype = "float32"
    shard_rows: Annotated[int, Field(ge=1)] = 16384
    max_rows: Annotated[int, Field(ge=1)]
    engine_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    engine: EngineOptions = EngineOptions()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers are {list(self.layers)}; allowed: each once, in order")
        if self.span == "prompt" and self.generate > 1:
            raise ValueError("generate came with span prompt, which holds no generated token; use span all")
        if (most := self.most_rows * len(self.layers)) > self.max_rows:
            raise ValueError(
                f"a text may have {most} rows ({self.most_rows} tokens at {len(self.layers)} layers) and max_rows is "
                f"{self.max_rows}; lower max_text_tokens or raise max_rows"
            )
        return self

    @property
    def most_rows(self) -> int:
        """The most rows of one text at one layer."""
        return self.rows_of(self.max_text_tokens)

    def rows_of(self, text_tokens: int) -> int:
        """The most rows, at one layer, of a text with this many tokens; 0 if it is too short to be read."""
        if text_tokens <= self.skip_first:
            return 0
        # the last generated token is never fed back
        return text_tokens - self.skip_first + (self.generate - 1 if self.span == "all" else 0)

    @property
    def record(self) -> dict[str, Any]:
        """The settings as plain types, for the manifest."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 over all settings."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def parse(cls, given: dict[str, Any]) -> CaptureSettings:
        """Build settings.

        Raises:
            StudyError: a value is wrong; the message names the first one.
        """
        layers = given["layers"]
        most = (given["max_text_tokens"] + given["generate"]) * len(layers)
        try:
            return cls.model_validate({**given, "max_rows": given["max_rows"] or most})
        except ValidationError as error:
            first = error.errors()[0]
            name = "--" + str(first["loc"][-1]).replace("_", "-") + ": " if first["loc"] else ""
            raise StudyError(
                f"{name}{first['msg'].removeprefix('Value error, ')}. See vllm-steer capture --help."
            ) from error
