"""An append-only file of JSON lines that survives a crash in the middle of a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batch_jobs.errors import StudyError
from batch_jobs.files.documents import json_lines

# JSON and `json_lines` allow these inside a line; readers that use str.splitlines would split there
_ESCAPED_LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of the file; none if there is no file. Leaves out a last line that a crash cut short.

    Raises:
        StudyError: any other line is not a JSON object in UTF-8 or holds text without a UTF-8 form, or the file cannot
            be read; the message names the file.
    """
    whole, tail = _split(path)
    return [line.entry for line in json_lines(whole + tail, path, advice="mend or delete that line")]


class RecordWriter:
    """Context manager that appends records to the file. Only one writer at a time may use a file."""

    def __init__(self, path: Path) -> None:
        """The file is opened, and made, only on entering the context."""
        self._path = path

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole, tail = _split(self._path)
        self._file = self._path.open("ab")
        self._file.truncate(len(whole))
        if tail:  # a whole record that lacks only its line end
            self._file.write(tail + b"\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; it is on disk when this returns.

        Every text in `record` must have a UTF-8 form.

        Raises:
            OSError: the line cannot be written.
        """
        line = json.dumps(dict(record), ensure_ascii=False).translate(_ESCAPED_LINE_ENDS)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _split(path: Path) -> tuple[bytes, bytes]:
    """The part that ends in a line end, and the last line if it has none; empty if that line is cut short."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b"", b""
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); give the path of a file.") from error
    whole, end, tail = content.rpartition(b"\n")
    return whole + end, tail if _is_object(tail) else b""


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:  # not JSON, or not UTF-8
        return False
