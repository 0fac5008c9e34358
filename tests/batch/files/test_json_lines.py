from __future__ import annotations

from pathlib import Path

import pytest

from batch_jobs.config.study import StudyError
from batch_jobs.files.json_lines import RecordWriter, read_records

# str.splitlines splits at these, and JSON allows them inside a string
EVERY_LINE_END_BUT_LF = ("\x85", "\u2028", "\u2029")


def test_what_is_appended_is_read_back_whatever_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = [{"text": "a\nb"}, {"text": "line\u2028end, next\x85line, α"}]
    for record in records:
        with RecordWriter(path) as file:
            file.append(record)
    assert read_records(path) == records
    # also for readers that split at every Unicode line end
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert "α" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("torn", [b'{"id": 2, "te', b'{"text": "\xce', b"42", b'"id"'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": 1}\n' + torn)
    assert read_records(path) == [{"id": 1}]
    assert path.read_bytes().endswith(torn)  # reading changes nothing
    with RecordWriter(path) as file:
        file.append({"id": 2})
    assert path.read_bytes() == b'{"id": 1}\n{"id": 2}\n'


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2}')
    assert read_records(path) == [{"id": 1}, {"id": 2}]
    with RecordWriter(path) as file:
        file.append({"id": 3})
    assert read_records(path) == [{"id": 1}, {"id": 2}, {"id": 3}]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id"\n{"id": 3}\n')
    with pytest.raises(StudyError, match=r"records\.jsonl: line 2: not JSON .*; mend or delete that line"):
        read_records(path)
    path.write_bytes(b'{"id": 1}\n[2]\n{"id": 3}\n')
    with pytest.raises(StudyError, match="line 2: got list; it must be a JSON object"):
        read_records(path)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    text = "".join(EVERY_LINE_END_BUT_LF)
    path.write_text(f'{{"text": "{text}"}}\n{{"id": 2}}\r\n', encoding="utf-8", newline="")
    assert read_records(path) == [{"text": text}, {"id": 2}]
    with RecordWriter(path) as file:
        file.append({"id": 3})
    assert read_records(path) == [{"text": text}, {"id": 2}, {"id": 3}]


@pytest.mark.parametrize("end", ["\n", ""])
def test_text_without_a_utf8_form_is_refused_and_not_taken_for_a_torn_line(tmp_path: Path, end: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": 1}\n{"text": "half \\ud83d"}' + end, encoding="utf-8")
    with pytest.raises(StudyError, match=r"line 2: field text: got 'half \\ud83d', which has no UTF-8 form"):
        read_records(path)


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []
