"""A capture writes every row once, whatever interrupts it. The engine answers from a formula; test_captured_rows.py
compares the rows of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from batch_jobs.capture import run_capture
from batch_jobs.capture.run_capture import Captured, capture
from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.shard_file import capture_shard
from batch_jobs.capture.texts import read_texts, sha256_of
from batch_jobs.cli.main import app
from batch_jobs.errors import StudyError
from batch_jobs.files.json_lines import read_records
from tests.support.formula_engine import COMPLETION_TOKENS, HIDDEN, FormulaEngine, install, rows_of

TEXTS = ["one text", "another, longer text", "é", "the fourth", "fifth", "and the last one"]
LAYERS = (1, 3)


class Killed(BaseException):
    """Stands in for kill -9: nothing after it runs."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    made = install(monkeypatch)
    monkeypatch.setattr(run_capture, "_hidden_size", lambda _: HIDDEN)
    return made


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS[:2], "", *TEXTS[2:]]) + "\n")  # a blank line holds no text, and counts as a line
    return path


PLACES = [0, 1, 3, 4, 5, 6]


def settings(texts: Path, **given: Any) -> CaptureSettings:
    fixed = {"model": "m", "model_revision": None, "texts_sha256": sha256_of(texts), "column": "text", "layers": LAYERS}
    defaults = {"max_text_tokens": 100, "generate": 1, "max_rows": None, "shard_rows": 20}
    return CaptureSettings.parse({**fixed, **defaults, **given})


def run(texts: Path, out: Path, engine: FormulaEngine, **given: Any) -> Captured:
    return capture(texts, settings(texts, **given), out, console=Console(quiet=True), tokenizer=engine)


def shards(out: Path) -> list[dict[str, Any]]:
    """The tensors of every shard, in order."""
    found = []
    for path in sorted(out.glob("shard-*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no mapping)
    return found


def whole(out: Path) -> dict[str, Any]:
    parts = shards(out)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("span", ["prompt", "all"])
def test_every_row_can_be_attributed_to_its_token(
    texts: Path, tmp_path: Path, engine: FormulaEngine, span: str
) -> None:
    generate, out = (1, tmp_path / "out") if span == "prompt" else (5, tmp_path / "out")
    made = run(texts, out, engine, span=span, generate=generate, skip_first=2)
    ids, places, positions = [], [], []
    for place, text in zip(PLACES, TEXTS, strict=True):
        if len(text) <= 2:
            continue
        own = [*map(ord, text), *([ord("h")] * (generate - 1))][2:]
        ids += own
        places += [place] * len(own)
        positions += range(2, 2 + len(own))
    got = whole(out)
    assert set(got) == {"layer.1", "layer.3", "token_ids", "text_index", "position"}
    assert (got["token_ids"].tolist(), got["text_index"].tolist(), got["position"].tolist()) == (ids, places, positions)
    for layer in LAYERS:
        expected = [rows_of([token], layer, position)[0] for token, position in zip(ids, positions, strict=True)]
        np.testing.assert_array_equal(got[f"layer.{layer}"].numpy(), np.stack(expected))
    assert (made.rows, made.shards, made.reused) == (len(ids), len(shards(out)), 0)
    assert (made.counts.read, made.counts.cut, made.counts.short) == (5, 0, [3])
    assert all(len(part["token_ids"]) <= 20 or len(set(part["text_index"].tolist())) == 1 for part in shards(out))
    assert generate < COMPLETION_TOKENS  # the stand-in generates as many as were asked for


def test_long_texts_are_cut_and_counted(texts: Path, tmp_path: Path, engine: FormulaEngine) -> None:
    made = run(texts, tmp_path / "out", engine, max_text_tokens=8)
    assert (made.counts.read, made.counts.cut) == (6, 3)
    assert max(whole(tmp_path / "out")["position"].tolist()) == 7


@pytest.mark.parametrize("at", ["while reading", "between file and record"])
def test_a_capture_that_was_killed_goes_on_and_ends_with_the_same_files(
    texts: Path, tmp_path: Path, engine: FormulaEngine, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    run(texts, tmp_path / "whole", engine)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("shard-*")}
    assert len(expected) >= 4
    seen = 0

    def kill(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 3 and at == "while reading":
            (tmp_path / "out" / ".shard-00002.safetensors.123.part").write_bytes(b"half a file")
            raise Killed
        record = capture_shard(*args, **kwargs)
        if seen == 3:
            raise Killed
        return record

    monkeypatch.setattr(run_capture, "capture_shard", kill)
    with pytest.raises(Killed):
        run(texts, tmp_path / "out", engine)
    assert [record["shard"] for record in read_records(tmp_path / "out" / "shards.jsonl")] == [0, 1]
    before = len(engine.batches)
    made = run(texts, tmp_path / "out", engine)
    assert made.reused == 2
    assert len(engine.batches) - before == made.shards - 2, "a finished shard was read again"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("shard-*")} == expected
    assert run(texts, tmp_path / "out", engine).reused == len(expected)


@pytest.mark.parametrize("how", ["shortened", "gone", "of another capture"])
def test_a_finished_shard_whose_file_is_not_what_it_was_is_read_again(
    texts: Path, tmp_path: Path, engine: FormulaEngine, how: str
) -> None:
    out = tmp_path / "out"
    made, path = run(texts, out, engine), out / "shard-00001.safetensors"
    expected = path.read_bytes()
    if how == "shortened":
        path.write_bytes(expected[:-4])
    elif how == "gone":
        path.unlink()
    else:  # as large, but of other settings
        path.write_bytes(expected.replace(settings(texts).digest.encode(), b"0" * 16))
    again = run(texts, out, engine)
    assert again.reused == made.shards - 1
    assert path.read_bytes() == expected


def test_a_folder_of_another_capture_is_refused_with_the_difference(
    texts: Path, tmp_path: Path, engine: FormulaEngine
) -> None:
    run(texts, tmp_path / "out", engine)
    for change, said in (({"skip_first": 1}, "skip_first: 0 -> 1"), ({"dtype": "bfloat16"}, "dtype: 'float32'")):
        with pytest.raises(StudyError, match=said):
            run(texts, tmp_path / "out", engine, **change)
    texts.write_text("other texts\n")
    with pytest.raises(StudyError, match="texts_sha256"):
        run(texts, tmp_path / "out", engine)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(StudyError, match=r"holds files and no capture\.json"):
        run(texts, tmp_path / "mine", engine)


def test_two_captures_do_not_write_to_one_folder(texts: Path, tmp_path: Path, engine: FormulaEngine) -> None:
    folder = run_capture.CaptureFolder(tmp_path / "out")
    with folder.open(settings(texts)), pytest.raises(StudyError, match="another capture writes there"):
        run(texts, tmp_path / "out", engine)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_rounded_once_to_the_files_dtype(
    texts: Path, tmp_path: Path, engine: FormulaEngine, dtype: str
) -> None:
    run(texts, tmp_path / "whole", engine)
    run(texts, tmp_path / "out", engine, dtype=dtype)
    got, exact = whole(tmp_path / "out")["layer.3"], whole(tmp_path / "whole")["layer.3"]
    assert got.dtype == getattr(torch, dtype)
    assert torch.equal(got, exact.to(got.dtype))


def test_a_row_beyond_float16_is_refused_and_not_written_as_infinity(
    texts: Path, tmp_path: Path, engine: FormulaEngine
) -> None:
    texts.write_text("a 😀\n")  # its token is 128512
    with pytest.raises(StudyError, match="128512, and float16 goes up to 65504"):
        run(texts, tmp_path / "out", engine, dtype="float16")
    assert not list((tmp_path / "out").glob("shard-*"))


def test_an_engine_that_returns_another_number_of_rows_is_an_error(
    texts: Path, tmp_path: Path, engine: FormulaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FormulaEngine, "answer", lambda *_: pytest.fail("not reached"))
    import vllm_steer

    monkeypatch.setattr(FormulaEngine, "generate", lambda *_, **__: [_output("one text")] * 2)
    monkeypatch.setitem(vars(vllm_steer), "collect_readouts", lambda _, outputs: [[None] for _ in outputs])
    with pytest.raises(StudyError, match="returned no rows for text 0"):
        run(texts, tmp_path / "out", engine, shard_rows=30)


def _output(text: str) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])], prompt_token_ids=list(map(ord, text)))


def test_texts_come_from_lines_objects_and_tables_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\u2028line\r\n\ntwo\n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n')
    pq.write_table(pa.table({"body": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.txt", "text")) == [(0, "one\u2028line"), (2, "two")]
    assert list(read_texts(tmp_path / "a.jsonl", "text")) == [(0, "one"), (2, "two")]
    assert list(read_texts(tmp_path / "a.parquet", "body")) == [(0, "one"), (1, "two")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"x", "its name ends in '.csv'"),
        ("a.txt", b"fine\n\xff\n", "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}\n', "line 2: text is '3'"),
        ("a.jsonl", b'{"text": "fine"}\nno\n', "line 2: not JSON"),
        ("a.jsonl", b'{"texts": "fine"}\n', "line 1: text is 'None'"),
        ("a.parquet", b"no", "not a Parquet file"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_by_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError, match=said):
        list(read_texts(tmp_path / name, "text"))
    with pytest.raises(StudyError, match="no such file"):
        list(read_texts(tmp_path / "none.txt", "text"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_rows": 10}, "max_rows is 10; lower max_text_tokens or raise max_rows"),
        ({"generate": 4}, "generate came with span prompt"),
        ({"engine_dtype": "int8"}, "--engine-dtype"),
        ({"engine": {"speed": 2}}, "--speed"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(texts: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        settings(texts, **given)


def test_the_command_says_what_it_wrote_and_what_it_left_out(
    texts: Path, tmp_path: Path, engine: FormulaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_capture, "_tokenizer", lambda _: engine)
    options = ["--layers", "3,1", "--skip-first", "1", "--max-text-tokens", "9", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["capture", "owner/model", str(texts), *options, "--quiet"])
    assert done.exit_code == 0, done.output
    rows = sum(min(len(text), 9) - 1 for text in TEXTS)
    assert f"{rows} rows in 1 shards, 0 of them there before" in done.output
    assert "3 of 5 texts were cut to 9 tokens" in done.output
    assert "1 texts have no more than 1 tokens and were left out, e.g. 3" in done.output
    manifest = json.loads((tmp_path / "out" / "capture.json").read_text())
    assert manifest["settings"]["layers"] == [1, 3]
    assert manifest["settings"]["max_rows"] == (9 + 1) * 2
