"""A file of JSON lines that only grows, and that a crash in the middle of a line does not spoil."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from batch_jobs.errors import StudyError
from batch_jobs.files.documents import json_lines

# JSON leaves these alone and our own reader does too; other readers split lines by str.splitlines
_ESCAPED_LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of the file; none when there is no file. A last line torn by a crash is left out.

    Raises StudyError, naming file and line, for any other line that is no JSON object in UTF-8, and for text without
    a UTF-8 form.
    """
    whole, tail = _split(path)
    return [line.entry for line in json_lines(whole + tail, path, advice="mend or delete that line")]


class RecordWriter:
    """Appends records to the file, as a context manager. Not for two writers at once."""

    def __init__(self, path: Path) -> None:
        """Nothing is touched before the context is entered."""
        self._path = path

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole, tail = _split(self._path)
        self._file = self._path.open("ab")
        self._file.truncate(len(whole))
        if tail:  # a whole record that lacks its line end only
            self._file.write(tail + b"\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; it is on disk when this returns. Raises OSError when the disk does.

        Every text in `record` must have a UTF-8 form.
        """
        line = json.dumps(dict(record), ensure_ascii=False).translate(_ESCAPED_LINE_ENDS)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _split(path: Path) -> tuple[bytes, bytes]:
    """What ends in a line end, and the last line where it has none; that is empty when torn."""
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
