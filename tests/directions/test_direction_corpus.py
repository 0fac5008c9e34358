"""Broken direction files: each is refused in one line that names it, in memory proportional to the file's size."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.broken_directions import (
    BROKEN,
    ENDINGS,
    VALID,
    VALUES,
    described,
    gguf,
    npy,
    safetensors,
    tensor,
    valid,
    with_value,
)
from vllm_steer.directions import Direction, load_directions
from vllm_steer.errors import BadDirectionFile, BadVector, SteerError
from vllm_steer.server.registry.upload import uploaded_directions

pytestmark = pytest.mark.timeout(120)  # a reader that believes a count would loop for hours

# A vector of bytes becomes float32 and, for its norm, float64: 12 times its size, plus the file itself once or twice.
# Only allocations of Python and NumPy count; safetensors' own are bounded by its limit on a header, 100 MB.
# The constant is for NumPy's parser, which takes 2.5 MB for the worst header of the 10 kB that it accepts.
MOST_MEMORY_A_BYTE, MEMORY_FOR_ANY_FILE = 20, 4 << 20
LONGEST_MESSAGE = 1000


def load(path: Path) -> list[Direction]:
    return load_directions(path, "kind", 1) if path.suffix == ".npy" else load_directions(path)


@pytest.fixture(scope="module", autouse=True)
def _readers_are_imported() -> None:
    """Import the readers first, so that their imports are not counted."""
    import gguf as gguf_package
    import safetensors

    assert gguf_package
    assert safetensors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the files, in which an executed pickle would leave its mark."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "unpickled").exists(), "code of the file has run"


def refusal(read: Callable[[], list[Direction]], size: int, named: str) -> SteerError | None:
    """The refusal of a file of ``size`` bytes, or None if it is read. Any other error propagates."""
    tracemalloc.start()
    try:
        read()
        refused = None
    except (BadDirectionFile, BadVector) as error:
        refused = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY_FOR_ANY_FILE + MOST_MEMORY_A_BYTE * size, f"{peak} bytes were taken for {size}"
    if refused is not None:
        assert named in str(refused)
        assert "\n" not in str(refused)
        assert len(str(refused)) < LONGEST_MESSAGE
    return refused


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(folder: Path, name: str) -> None:
    path = folder / f"broken{Path(name).suffix}"
    path.write_bytes(BROKEN[name])
    assert refusal(lambda: load(path), len(BROKEN[name]), str(path)) is not None


# An upload gets the name in the URL, whatever the file calls it.
UPLOADS = [name for name in BROKEN if name.endswith(".safetensors") and not name.startswith("a name ")]


@pytest.mark.parametrize("name", UPLOADS)
def test_a_broken_upload_is_refused_and_does_not_say_where_the_server_keeps_it(folder: Path, name: str) -> None:
    body = BROKEN[name]
    refused = refusal(lambda: uploaded_directions("kind", None, body), len(body), "the upload")
    assert refused is not None
    assert tempfile.gettempdir() not in str(refused)


@pytest.mark.parametrize(
    "body",
    [b"", b"abc", bytes(64), with_value(np.nan), with_value(np.inf)],
    ids=["empty", "3 bytes", "zeros", "NaN", "inf"],
)
def test_an_upload_of_numbers_that_are_no_direction_is_refused(body: bytes) -> None:
    refused = refusal(lambda: uploaded_directions("kind", 1, body), len(body), "kind@1" if len(body) % 4 else "'kind'")
    assert refused is not None


@pytest.mark.parametrize("name", VALID)
def test_the_builders_of_this_corpus_build_what_loads(folder: Path, name: str) -> None:
    """Otherwise every refusal above could have an unintended reason."""
    path = folder / name
    path.write_bytes(VALID[name])
    loaded = load(path)
    keys = {"float32.npy": ["kind@1"], "bfloat16.gguf": ["bfloat16@1", "bfloat16@2"]}.get(name, ["kind@1", "kind@2"])
    assert [one.key for one in loaded] == keys
    kept = 0xFFFF0000 if "bfloat16" in name else 0xFFFFFFFF
    for one, expected in zip(loaded, VALUES, strict=False):
        assert np.array_equal(one.vector.view(np.uint32), expected.view(np.uint32) & kept)


@pytest.mark.parametrize("name", VALID)
def test_a_file_cut_at_any_byte_is_refused(folder: Path, name: str) -> None:
    whole, path = VALID[name], folder / name
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refusal(lambda: load(path), length, str(path)) is not None, f"{length} of {len(whole)} bytes were read"


@pytest.mark.parametrize("name", VALID)
def test_a_large_file_takes_a_small_multiple_of_its_size(folder: Path, name: str) -> None:
    """The file is ten times the constant, so the multiple decides; all of it is read before it is refused."""
    count = 10 * MEMORY_FOR_ANY_FILE
    floats, halves = (count // 4,), (count // 2,)
    content = {
        "float32.npy": npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},), }}", bytes(count)),
        "float32.safetensors": safetensors({"kind@1": described(0, count, shape=floats)}, bytes(count)),
        "bfloat16.safetensors": safetensors({"kind@1": described(0, count, "BF16", halves)}, bytes(count)),
        "float32.gguf": gguf(tensors=[tensor("direction.1", shape=floats)], data=bytes(count)),
        "bfloat16.gguf": gguf(tensors=[tensor("direction.1", shape=halves, kind=30)], data=bytes(count)),
    }[name]
    path = folder / name
    path.write_bytes(content)
    assert "all zeros" in str(refusal(lambda: load(path), len(content), str(path)))


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_no_file_is_refused_unopened(folder: Path, ending: str) -> None:
    """Opening a FIFO would wait for ever, and /dev/zero never ends."""
    os.mkfifo(folder / f"fifo{ending}")
    (folder / f"folder{ending}").mkdir()
    (folder / f"loop{ending}").symlink_to(folder / f"loop{ending}")
    (folder / f"nowhere{ending}").symlink_to(folder / "absent")
    (folder / f"device{ending}").symlink_to("/dev/zero")
    for path in (*sorted(folder.iterdir()), folder / f"absent{ending}", folder / ("n" * 300 + ending)):
        refused = refusal(lambda path=path: load(path), 0, str(path))
        assert ("no known layout" if os.path.isdir(path) else "no direction file at") in str(refused)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_link_to_a_file_is_read(folder: Path, ending: str) -> None:
    (folder / f"valid{ending}").write_bytes(valid(ending))
    (folder / f"link{ending}").symlink_to(folder / f"valid{ending}")
    assert load(folder / f"link{ending}")


@pytest.mark.parametrize("order", ["big", "little"])
def test_both_byte_orders_of_gguf_are_read(folder: Path, order: str) -> None:
    from gguf import GGUFEndian, GGUFWriter

    writer = GGUFWriter(folder / "d.gguf", "controlvector", endianess=GGUFEndian[order.upper()])
    writer.add_array("list", ["a", "b"])
    writer.add_tensor("direction.3", VALUES[0].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (one,) = load_directions(folder / "d.gguf")
    assert (one.key, one.vector.tolist()) == ("d@3", VALUES[0].tolist())


def test_numbers_in_fortran_order_and_of_the_other_byte_order_are_read(folder: Path) -> None:
    header = "{'descr': '>f4', 'fortran_order': True, 'shape': (16,), }"
    (folder / "d.npy").write_bytes(npy(header, VALUES[0].astype(">f4").tobytes(), version=(2, 0)))
    assert np.array_equal(load(folder / "d.npy")[0].vector, VALUES[0])


@pytest.mark.parametrize("name", VALID)
@hypothesis_settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_of_a_file_may_be_others(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    whole = VALID[name]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        at = data.draw(st.integers(0, len(changed) - 1), label="at")
        kind = data.draw(st.sampled_from(["put", "cut", "insert", "double"]), label="kind")
        if kind == "put":
            new = data.draw(
                st.sampled_from([b"\0", b"\xff", b"\x7f" * 8, b"\xff" * 8]) | st.binary(min_size=1, max_size=8)
            )
            changed[at : at + len(new)] = new
        elif kind == "cut":
            del changed[at : at + data.draw(st.integers(1, 16), label="length")]
        elif kind == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=16), label="new")
        else:
            changed[at:at] = changed[at : at + 32]
        if not changed:
            break
    path = tmp_path_factory.mktemp("mutated") / name
    path.write_bytes(changed)
    refusal(lambda: load(path), len(changed), str(path))
