"""Reads the texts of a capture one after another, so that a file of any size takes little memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from batch_jobs.errors import StudyError
from batch_jobs.files.documents import has_utf8_form, json_lines

_ADVICE = "give a .txt file with one text a line, or a .jsonl or .parquet file with a column of texts"
_PART_BYTES = 1 << 20


class SourceText(NamedTuple):
    """One text of the file.

    Attributes:
        place: where it stands in the file, from 0: the line, blank ones included, or the row.
        text: the text, not empty.
    """

    place: int
    text: str


def read_texts(path: Path, column: str) -> Iterator[SourceText]:
    """Yield the texts of a file in order; blank lines of .txt and .jsonl files hold none.

    Raises:
        StudyError: the file cannot be read or has another form, or an entry of ``column`` is no text.
    """
    readers = {".txt": _lines, ".jsonl": _objects, ".parquet": _table_rows}
    reader = readers.get(path.suffix)
    if reader is None:
        raise StudyError(f"{path}: its name ends in {path.suffix!r}; {_ADVICE}.")
    if not path.is_file():
        raise StudyError(f"{path}: there is no such file; {_ADVICE}.")
    yield from reader(path, column)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content.

    Raises:
        StudyError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(_PART_BYTES):
                digest.update(part)
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); {_ADVICE}.") from error
    return digest.hexdigest()


def _lines(path: Path, column: str) -> Iterator[SourceText]:
    del column
    with path.open("rb") as file:  # only "\n" ends a line: a text may hold the other characters that end one
        for index, line in enumerate(file):
            try:
                text = line.rstrip(b"\r\n").decode()
            except UnicodeDecodeError as error:
                raise StudyError(f"{path}: line {index + 1}: not UTF-8 text ({error.reason}); {_ADVICE}.") from error
            if text.strip():
                yield SourceText(index, text)


def _objects(path: Path, column: str) -> Iterator[SourceText]:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            for entry in json_lines(line, path, advice=_ADVICE, start=index + 1):
                yield SourceText(index, _text(entry.entry.get(column), entry.where, column))


def _table_rows(path: Path, column: str) -> Iterator[SourceText]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise StudyError(f"{path}: not a Parquet file ({error}); {_ADVICE}.") from error
    if column not in table.schema_arrow.names:
        raise StudyError(
            f"{path}: there is no column {column!r}; it has {', '.join(table.schema_arrow.names)}. Name one of them "
            "with --column."
        )
    index = 0
    with table:
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield SourceText(index, _text(value, f"{path}: row {index + 1}", column))
                index += 1


def _text(value: object, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip() or not has_utf8_form(value):
        raise StudyError(f"{where}: {column} is {str(value)[:60]!r}; it must be a text that is not empty.")
    return value
