from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from batch_jobs.files import object_store
from batch_jobs.files.object_store import StoreError, StorePath, is_address, shown_address, without_secrets
from tests.support.s3_server import S3Server

NO_WAIT = (0.0, 0.0)


@pytest.fixture
def place(s3: S3Server) -> StorePath:
    return StorePath.parse(s3.address("runs/demo"))


def test_a_file_is_written_listed_read_replaced_and_deleted(place: StorePath) -> None:
    file = place / "a" / "b.txt"
    assert place.files() == {}
    assert (file.exists(), file.state()) == (False, None)
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    file.write_bytes(b"one")
    file.write_bytes("zwei α".encode())
    (place / "c").write_bytes(b"")
    assert {name: state.size for name, state in place.files().items()} == {"a/b.txt": 7, "c": 0}
    assert (file.read_text(), file.name, file.state()) == ("zwei α", "b.txt", place.files()["a/b.txt"])
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()
    assert list(place.files()) == ["c"]


def test_an_object_of_many_pieces_comes_back_whole(place: StorePath) -> None:
    content = bytes(range(256)) * (23 * 2**12)  # 23 MiB: more than two of the pieces that pyarrow sends
    (place / "big").write_bytes(content)
    assert (place / "big").read_bytes() == content


def test_a_place_can_be_sent_to_another_process_without_the_credentials(place: StorePath) -> None:
    (place / "x").write_bytes(b"1")
    sent = pickle.dumps(place)
    assert b"the-secret-of-the-test" not in sent
    assert b"AKIATESTING" not in sent
    assert pickle.loads(sent).files().keys() == {"x"}


def test_the_endpoint_of_the_environment_is_used(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    StorePath.parse("s3://studies/runs/demo/x").write_bytes(b"1")
    assert StorePath.parse(s3.address("runs/demo/x")).read_bytes() == b"1"


@pytest.mark.parametrize("call", [StorePath.files, lambda place: place.write_bytes(b"1")], ids=["list", "write"])
def test_a_bucket_that_is_not_there_is_one_line_that_names_it(s3: S3Server, call: object) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError) as refused:
        call(StorePath.parse(s3.address("runs/demo", bucket="nobodys")))  # type: ignore[operator]
    text = str(refused.value)
    assert text.startswith("s3://nobodys/runs/demo cannot be ")
    assert "NO_SUCH_BUCKET" in text
    assert "check the bucket's name" in text
    assert "\n" not in text
    assert "127.0.0.1" not in text
    assert time.monotonic() - began < object_store.RETRY_SECONDS[0], "another try would not help"


def test_a_store_that_forbids_is_one_line_without_another_try(s3: S3Server, place: StorePath) -> None:
    (place / "x").write_bytes(b"1")
    s3.ask_for_permissions()
    began = time.monotonic()
    for call in (place.files, (place / "x").read_bytes, lambda: (place / "x").write_bytes(b"2"), (place / "x").unlink):
        with pytest.raises(StoreError, match=r"^s3://studies/runs/demo\S* cannot be .*credentials") as refused:
            call()
        assert "the-secret" not in str(refused.value)
    assert time.monotonic() - began < object_store.RETRY_SECONDS[0]
    s3.reset()


def test_a_store_that_comes_back_is_waited_for(s3: S3Server, place: StorePath) -> None:
    s3.tell("stop")
    back = threading.Timer(1.0, s3.tell, ("start",))
    back.start()
    (place / "x").write_bytes(b"1")
    back.join()
    assert (place / "x").read_bytes() == b"1"


def test_a_store_that_stays_away_is_one_line_and_leaves_the_old_content(
    s3: S3Server, place: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", ())
    (place / "x").write_bytes(b"old")
    s3.tell("stop")
    try:
        with pytest.raises(StoreError, match=r"NETWORK_CONNECTION.*run the same command again"):
            (place / "x").write_bytes(b"new")
    finally:
        s3.tell("start")
    assert (place / "x").read_bytes() == b"old"


def test_a_store_that_refuses_the_second_of_three_pieces_publishes_nothing(s3: S3Server, place: StorePath) -> None:
    (place / "x").write_bytes(b"old")
    s3.tell("refuse-second-piece")
    try:
        with pytest.raises(StoreError, match="ACCESS_DENIED"):
            (place / "x").write_bytes(bytes(23 * 2**20))
    finally:
        s3.tell("take-all-pieces")
    assert (place / "x").read_bytes() == b"old"


def test_a_file_system_without_objects_gets_whole_files_by_renaming(tmp_path: Path) -> None:
    """As in HDFS, whose server cannot be run here; the calls are those of pyarrow's every file system."""
    place = StorePath(fs.LocalFileSystem(), f"{tmp_path}/run", "hdfs://host/run")
    (place / "a" / "b").write_bytes(b"1")
    (place / "a" / "b").write_bytes(b"22")
    assert [path.name for path in (tmp_path / "run" / "a").iterdir()] == ["b"]
    assert (place / "a" / "b").read_bytes() == b"22"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/runs/demo", "s3://bucket/runs/demo"),
        ("s3://bucket/runs/demo/?endpoint_override=host:9000&scheme=http", "s3://bucket/runs/demo"),
        ("s3://AKIA:secret@bucket/runs", "s3://bucket/runs"),
        ("s3://AKIA:sec/ret@bucket/runs", "s3://bucket/runs"),
        ("S3://bucket/x", "s3://bucket/x"),
        ("abfs://container@account.dfs.core.windows.net/x?sv=1", "abfs://container@account.dfs.core.windows.net/x"),
        ("abfs://container:key@account/x", "abfs://container@account/x"),
        ("hdfs://me@host:8020/x", "hdfs://host:8020/x"),
        ("runs/demo", "runs/demo"),
    ],
)
def test_what_is_shown_of_an_address_holds_no_secret(address: str, shown: str) -> None:
    assert shown_address(address) == shown
    assert is_address(address) == ("://" in address)


def test_addresses_within_a_command_lose_their_secrets() -> None:
    command = "vllm-steer study run demo.yaml --out='s3://AKIA:secret@bucket/x?key=1' --model owner/name"
    assert without_secrets(command) == "vllm-steer study run demo.yaml --out='s3://bucket/x' --model owner/name"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://AKIA:secret@bucket/x", "holds a password"),
        ("s3://AKIA:sec/ret@bucket/x", "holds a password"),
        ("ftp://bucket/x?key=secret", "not an address that pyarrow opens"),
        ("s3://bucket/x?key=secret", "not an address that pyarrow opens"),
        ("s3://bucket", "names no folder"),
        ("s3://", "names no folder"),
    ],
)
def test_a_wrong_address_is_refused_without_repeating_its_secrets(address: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as refused:
        StorePath.parse(address)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)
