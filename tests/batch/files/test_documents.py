from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.errors import StudyError
from batch_jobs.files.documents import (
    has_utf8_form,
    json_lines,
    printable,
    read_json,
    read_json_lines,
    read_yaml,
    refuse_half_pairs,
)
from vllm_steer.errors import SettingsError

# str.splitlines splits at these, and JSON allows them inside a string
UNICODE_LINE_ENDS = ("\x85", "\u2028", "\u2029")


@pytest.mark.parametrize("mark", UNICODE_LINE_ENDS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path, mark: str, end: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(f'{{"text": "one{mark}two"}}{end}{end}{{"text": "three"}}'.encode())
    lines = list(read_json_lines(path, advice="mend it"))
    assert [(line.number, line.entry) for line in lines] == [(1, {"text": f"one{mark}two"}), (3, {"text": "three"})]
    assert lines[1].where == f"{path}: line 3"


@pytest.mark.parametrize("control", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_a_control_character_in_a_line_is_a_fault_of_that_line(control: str) -> None:
    content = f'{{"id": 1}}\n{{"text": "one{control}two"}}\n'.encode()
    with pytest.raises(StudyError, match=r"^f: line 2: not JSON \(Invalid control character at column 14\); mend"):
        list(json_lines(content, Path("f"), advice="mend it"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b"[1]", "got list; it must be a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8 text (invalid start byte at byte 10)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 text (invalid continuation byte at byte 10)"),
        (b'{"number": ' + b"1" * 5000 + b"}", "not JSON that can be read (Exceeds the limit"),
        (b'{"text": "half \\ud83d, no more"}', r"field text: got 'half \ud83d, no more', which has no UTF-8 form"),
        (b'{"a": [{"b": ["x", "\\udc00"]}]}', r"field a: entry 1: field b: entry 2: got '\udc00', which has no"),
        (b'{"a": {"\\ud83d": 1}}', r"field a: a field's name: got '\ud83d', which has no UTF-8 form"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_line(tmp_path: Path, line: bytes, told: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"id": 1}\n' + line + b'\n{"id": 3}\n')
    with pytest.raises(StudyError) as caught:
        list(read_json_lines(path, advice="mend it"))
    message = str(caught.value)
    assert message.startswith(f"{path}: line 2: {told}")
    assert message.endswith("; mend it.")
    assert "\n" not in message
    assert has_utf8_form(message)


def test_both_halves_of_a_pair_make_a_character(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    path.write_text('["\\ud83d\\ude00"]', encoding="utf-8")
    assert read_json(path, advice="mend it") == ["😀"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[1,\n2", "not JSON (Expecting ',' delimiter at line 2, column 2)"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b'["x", {"deep": "\\ud800"}]', r"entry 2: field deep: got '\ud800', which has no UTF-8 form"),
        (b'{"a\\nb": "\\ud800"}', r"field 'a\nb': got '\ud800', which has no UTF-8 form"),
        (json.dumps("x" * 50 + "\ud800" + "y" * 50).encode(), f"got '{'x' * 20}\\ud800{'y' * 19}', which has no"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_a_documents_fault_names_the_field_and_is_of_the_readers_own_kind(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "document.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_json(path, advice="mend it", error=SettingsError)
    assert str(caught.value).startswith(f"{path}: {told}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.json: cannot be read \(No such file or directory\); mend it\."):
        read_json(tmp_path / "none.json", advice="mend it")
    with pytest.raises(StudyError, match=r"cannot be read \(Is a directory\); mend it\."):
        read_json(tmp_path, advice="mend it")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('a: ["x", "\\uD800"]', r"field a: entry 2: got '\ud800', which has no UTF-8 form"),
        ("a: [1", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ('a: "\\U00110000"', "not valid YAML"),
        ("[" * 5_000, "not valid YAML"),
    ],
)
def test_a_fault_of_a_yaml_file_is_one_line_too(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "document.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        read_yaml(path, advice="mend it")
    assert str(caught.value).startswith(f"{path}: {told}")
    assert "\n" not in str(caught.value)


def test_a_document_that_holds_itself_is_looked_at_once() -> None:
    circle: list[Any] = ["x"]
    circle.append(circle)
    refuse_half_pairs(circle, "here", advice="mend it")
    with pytest.raises(StudyError, match=r"here: entry 3: got '\\ud800'"):
        refuse_half_pairs([*circle, "\ud800"], "here", advice="mend it")


def test_a_path_counts_as_text() -> None:
    with pytest.raises(StudyError, match=r"here: field pairs: got 'caf\\udce9'"):
        refuse_half_pairs({"pairs": Path("caf\udce9")}, "here", advice="mend it")


def test_half_a_pair_is_spelt_out_for_printing() -> None:
    assert printable("half \ud83d, α") == "half \\ud83d, α"
    assert not has_utf8_form("half \ud83d")
    assert has_utf8_form("whole 😀, α\u2028")
