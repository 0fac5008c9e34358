"""Reads files, given by a user or written by a run, as text, JSON, JSON lines or YAML.

Every error message is one line that names the file and the place in it. Every returned text has a UTF-8 form: JSON and
YAML can spell half of a surrogate pair (`"\\ud800"`), which Python holds as a character, but no tokenizer, Parquet file
or HTTP request can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from batch_jobs.errors import StudyError
from vllm_steer.errors import SteerError

Place = Path | Traversable

_HALF_PAIR_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN_CHARACTERS = 20
"""Characters shown on each side of a fault in a text."""


class JsonLine(NamedTuple):
    """One object of a file of JSON lines."""

    number: int
    """Line number, from 1; blank lines count."""
    where: str
    """File and line, for messages."""
    entry: dict[str, Any]
    """The object on the line."""


def has_utf8_form(text: str) -> bool:
    """Whether `text` can be stored and sent: none of its characters is half of a surrogate pair."""
    return _fault_at(text) is None


def printable(text: str) -> str:
    """`text` with each half of a surrogate pair spelt out (`\\ud800`), so that it can be stored and printed."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_text(place: Place, *, advice: str, error: type[SteerError] = StudyError) -> str:
    """The text of a UTF-8 file.

    Raises:
        error: the file cannot be read; the message ends in `advice`.
    """
    return _decoded(_read_bytes(place, advice, error), f"{place}", advice, error)


def read_json(place: Place, *, advice: str, error: type[SteerError] = StudyError) -> Any:
    """The document in a JSON file.

    Raises:
        error: the file cannot be read, is not JSON in UTF-8, or holds text without a UTF-8 form; the message ends in
            `advice`.
    """
    return _parsed(_read_bytes(place, advice, error), f"{place}", advice, error)


def read_json_lines(place: Place, *, advice: str, error: type[SteerError] = StudyError) -> Iterator[JsonLine]:
    """Yield the objects in a file of JSON lines; see `json_lines`.

    Raises:
        error: as `json_lines`, and if the file cannot be read.
    """
    return json_lines(_read_bytes(place, advice, error), place, advice=advice, error=error)


def json_lines(
    content: bytes, place: Place, *, advice: str, error: type[SteerError] = StudyError, start: int = 1
) -> Iterator[JsonLine]:
    """Yield the objects in the content of a file of JSON lines; skips blank lines.

    A line ends only at "\\n", with or without "\\r" before it: the other characters at which `str.splitlines` splits
    may stand inside a JSON string. The first line of the content has the number `start`.

    Raises:
        error: a line is not a JSON object in UTF-8 or holds text without a UTF-8 form; the message names file and line
            and ends in `advice`.
    """
    for number, line in enumerate(content.split(b"\n"), start=start):
        if not line.strip():
            continue
        where = f"{place}: line {number}"
        entry = _parsed(line, where, advice, error)
        if not isinstance(entry, dict):
            raise error(f"{where}: got {type(entry).__name__}; it must be a JSON object; {advice}.")
        yield JsonLine(number, where, entry)


def read_yaml(place: Place, *, advice: str, error: type[SteerError] = StudyError) -> Any:
    """The document in a YAML file.

    Raises:
        error: the file cannot be read, is not YAML in UTF-8, or holds text without a UTF-8 form.
    """
    text = read_text(place, advice=advice, error=error)
    try:
        document = yaml.safe_load(text)
    # ValueError: an invalid date, or a character beyond Unicode
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise error(f"{place}: not valid YAML: {' '.join(printable(str(fault)).split())}.") from fault
    refuse_half_pairs(document, f"{place}", advice=advice, error=error)
    return document


def refuse_half_pairs(document: Any, where: str, *, advice: str, error: type[SteerError] = StudyError) -> None:
    """Check that every text in nested mappings and lists has a UTF-8 form. Paths count as text.

    Raises:
        error: a text has none; the message names `where`, the field or entry and the text, and ends in `advice`.
    """
    # a stack, since recursion over deep nesting would raise RecursionError; YAML's aliases can also form a cycle
    pending: list[tuple[str, Any]] = [("", document)]
    seen: set[int] = set()
    while pending:
        place, value = pending.pop()
        if isinstance(value, str | Path):
            text = str(value)
            if (at := _fault_at(text)) is not None:
                shown = text[max(at - _SHOWN_CHARACTERS, 0) : at + _SHOWN_CHARACTERS]
                raise error(
                    f"{where}{place}: got {shown!r}, which has no UTF-8 form (half of a surrogate pair); {advice}."
                )
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending += reversed(list(_members(place, value)))


def _members(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield from ((f"{place}: entry {number}", member) for number, member in enumerate(value, start=1))
        return
    for key, member in value.items():
        yield f"{place}: a field's name", key
        name = key if isinstance(key, str) and key.isprintable() else repr(key)
        yield f"{place}: field {name}", member


def _fault_at(text: str) -> int | None:
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        return fault.start
    return None


def _read_bytes(place: Place, advice: str, error: type[SteerError]) -> bytes:
    try:
        return place.read_bytes()
    except OSError as fault:
        raise error(f"{place}: cannot be read ({fault.strerror}); {advice}.") from fault


def _decoded(content: bytes, where: str, advice: str, error: type[SteerError]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{where}: not UTF-8 text ({fault.reason} at byte {fault.start}); {advice}.") from fault


def _parsed(content: bytes, where: str, advice: str, error: type[SteerError]) -> Any:
    text = _decoded(content, where, advice, error)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as fault:
        column = f"column {fault.colno}"
        at = f"line {fault.lineno}, {column}" if "\n" in text else column
        raise error(f"{where}: not JSON ({fault.msg.removesuffix(' at')} at {at}); {advice}.") from fault
    except (ValueError, RecursionError) as fault:  # thousands of digits in a number, or thousands of brackets
        raise error(f"{where}: not JSON that can be read ({fault}); {advice}.") from fault
    if _HALF_PAIR_ESCAPE.search(text):  # UTF-8 itself cannot encode one
        refuse_half_pairs(document, where, advice=advice, error=error)
    return document
