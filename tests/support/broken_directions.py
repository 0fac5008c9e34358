"""Direction files that are broken in one way each, and the functions that build them."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from typing import Any

import numpy as np

VALUES = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
ENDINGS = [".safetensors", ".gguf", ".npy"]


def valid(ending: str) -> bytes:
    """A valid file of VALUES in float32."""
    if ending == ".npy":
        return npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16,), }", VALUES[0].tobytes())
    if ending == ".gguf":
        tensors = [tensor("direction.1"), tensor("direction.2", offset=64)]
        return gguf(fields=[text_field("vllm_steer.name", "kind")], tensors=tensors, data=VALUES.tobytes())
    return safetensors({"kind@1": described(0, 64), "kind@2": described(64, 128)}, VALUES.tobytes())


def valid_bfloat16(ending: str) -> bytes:
    """A valid safetensors or GGUF file of the upper halves of VALUES."""
    data = (VALUES.view(np.uint32) >> 16).astype("<u2").tobytes()
    if ending == ".gguf":
        return gguf(tensors=[tensor("direction.1", kind=30), tensor("direction.2", kind=30, offset=32)], data=data)
    return safetensors({"kind@1": described(0, 32, "BF16"), "kind@2": described(32, 64, "BF16")}, data)


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """A .npy file; ``length`` replaces the recorded length of its header."""
    text = header.encode() if isinstance(header, str) else header
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", size) + text + data


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; ``length`` replaces the recorded length of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(start: int, end: int, dtype: str = "F32", shape: Any = (16,)) -> dict[str, Any]:
    """A tensor's entry in a safetensors header; ``start`` and ``end`` are byte offsets."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string; ``length`` replaces its recorded length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def text_field(key: str, value: str | bytes, length: int | None = None) -> bytes:
    """A GGUF metadata field of type string; ``length`` replaces the recorded length of its value."""
    return text(key) + struct.pack("<I", 8) + text(value, length)


def array_field(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    """A GGUF metadata field of type array that records ``count`` elements of type ``kind``."""
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


def tensor(
    name: str | bytes, shape: tuple[int, ...] = (16,), kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    """A GGUF tensor's description; ``dimensions`` replaces the recorded number of dimensions."""
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def gguf(
    fields: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", version: int = 3, **counts: int
) -> bytes:
    """A GGUF file; ``counts`` replace the recorded numbers of fields and tensors."""
    head = struct.pack(
        "<4sIQQ", b"GGUF", version, counts.get("tensors_told", len(tensors)), counts.get("fields_told", len(fields))
    )
    head += b"".join((*fields, *tensors))
    return head + bytes(-len(head) % 32) + data


class Bomb:
    """Makes the folder ``unpickled`` when it is unpickled; tests look for that folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def pickled_array() -> bytes:
    """A .npy file of an object array with a ``Bomb``."""
    stored = io.BytesIO()
    np.save(stored, np.array([Bomb()], dtype=object), allow_pickle=True)
    return stored.getvalue()


def with_value(value: float, dtype: str = "<f4") -> bytes:
    """The bytes of VALUES[0] in ``dtype``, with ``value`` as one element."""
    broken = VALUES[0].astype(dtype)
    broken[3] = value
    return broken.tobytes()


def bfloat16_with(bits: int) -> bytes:
    """The bytes of sixteen bfloat16 numbers, one of them with these bits."""
    values = np.full(16, 0x3F80, "<u2")
    values[3] = bits
    return values.tobytes()


FLAT = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
OF_TYPE = "{'descr': %s, 'fortran_order': False, 'shape': (16,), }"
DATA = VALUES[0].tobytes()
ONE = {"kind@1": described(0, 64)}

VALID = {
    **{f"float32{ending}": valid(ending) for ending in ENDINGS},
    **{f"bfloat16{ending}": valid_bfloat16(ending) for ending in (".safetensors", ".gguf")},
}
BROKEN: dict[str, bytes] = {
    # NumPy
    "negative dimension.npy": npy(FLAT % "(-16,)", DATA),
    "more than the file has.npy": npy(FLAT % "(17,)", DATA),
    "2**62 elements.npy": npy(FLAT % "(4611686018427387904,)", DATA),
    "a size that overflows to 0.npy": npy(FLAT % "(4294967296, 4294967296)", DATA),
    "a size that overflows to 16 bytes.npy": npy(FLAT % "(4611686018427387908,)", DATA),
    "a size beyond 64 bits.npy": npy(FLAT % "(340282366920938463463374607431768211456,)", DATA),
    "no element.npy": npy(FLAT % "(0,)"),
    "a scalar.npy": npy(FLAT % "()", DATA[:4]),
    "two dimensions.npy": npy(FLAT % "(4, 4)", DATA),
    "two dimensions, Fortran order.npy": npy("{'descr': '<f4', 'fortran_order': True, 'shape': (4, 4), }", DATA),
    "a dimension that is no integer.npy": npy(FLAT % "(16.0,)", DATA),
    "a shape that is no tuple.npy": npy(FLAT % "[16]", DATA),
    "pickled objects.npy": pickled_array(),
    "a pickle and nothing else.npy": pickle.dumps(Bomb()),
    "structured type.npy": npy(OF_TYPE % "[('a', '<f4')]", DATA),
    "subarray type.npy": npy(OF_TYPE % "'(1000000,1000000)f4'", DATA),
    "strings.npy": npy(OF_TYPE % "'|S4'", DATA),
    "complex.npy": npy(OF_TYPE % "'<c8'", DATA * 2),
    "dates.npy": npy(OF_TYPE % "'<M8[s]'", DATA * 2),
    "a type of no name.npy": npy(OF_TYPE % "'<q9'", DATA),
    "a type of two gigabytes.npy": npy(OF_TYPE % "'|V2000000000'", DATA),
    "NaN.npy": npy(FLAT % "(16,)", with_value(np.nan)),
    "infinity.npy": npy(FLAT % "(16,)", with_value(np.inf)),
    "more than float32 holds.npy": npy(OF_TYPE % "'<f8'", with_value(1e300, "<f8")),
    "less than float32 holds.npy": npy(OF_TYPE % "'<f8'", np.full(16, 1e-60).tobytes()),
    "items of two bytes.npy": npy(OF_TYPE % "'|V2'", DATA[:32]),
    "items of two bytes, little-endian.npy": npy(OF_TYPE % "'<V2'", DATA[:32]),
    "no element, a dimension of 2**63.npy": npy(FLAT % "(0, 9223372036854775808)", DATA),
    "all zeros.npy": npy(FLAT % "(16,)", bytes(64)),
    "header of 4 GiB.npy": npy(FLAT % "(16,)", DATA, version=(2, 0), length=(1 << 32) - 1),
    "header of 4 GiB, version 3.npy": npy(FLAT % "(16,)", DATA, version=(3, 0), length=(1 << 32) - 1),
    "header of 300 kB.npy": npy(" " * 300_000 + "{}", DATA, version=(2, 0)),
    "header cut by its length.npy": npy(FLAT % "(16,)", DATA, length=20),
    "header without a shape.npy": npy("{'descr': '<f4', 'fortran_order': False}", DATA),
    "header with a key more.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (16,), 'a': 1}", DATA),
    "header of signs.npy": npy("-" * 9000 + "1", DATA),
    "header of brackets.npy": npy("[" * 9000, DATA),
    "header of closed brackets.npy": npy("[" * 90 + "]" * 90, DATA),
    "header of other bytes.npy": npy(b"\xff\xfe" * 40, DATA, version=(3, 0)),
    "header with a call.npy": npy("__import__('os').mkdir('unpickled')", DATA),
    "version 9.npy": npy(FLAT % "(16,)", DATA, version=(9, 0)),
    # safetensors
    "header of 2**63.safetensors": safetensors(ONE, DATA, length=1 << 63),
    "header of 90 MB.safetensors": safetensors(ONE, DATA, length=90 << 20),
    "header one longer than the file.safetensors": safetensors(ONE, length=len(json.dumps(ONE)) + 1),
    "header of length 0.safetensors": safetensors(b""),
    "no tensor.safetensors": safetensors({}),
    "header a list.safetensors": safetensors([1]),
    "header not UTF-8.safetensors": safetensors(b'{"\xff\xfe@1": {}}'),
    "header nested deeply.safetensors": safetensors(b'{"kind@1":' + b"[" * 200_000),
    "metadata nested deeply.safetensors": safetensors(
        {**ONE, "__metadata__": {"vllm_steer": '{"directions":' + "[" * 200_000}}, DATA
    ),
    "metadata a number of 10,000 digits.safetensors": safetensors(
        {**ONE, "__metadata__": {"vllm_steer": "9" * 10_000}}, DATA
    ),
    "metadata no JSON.safetensors": safetensors({**ONE, "__metadata__": {"vllm_steer": "{\n"}}, DATA),
    "metadata of another form.safetensors": safetensors({**ONE, "__metadata__": {"vllm_steer": "[1]"}}, DATA),
    "metadata of numbers.safetensors": safetensors({**ONE, "__metadata__": {"vllm_steer": 1}}, DATA),
    "offsets beyond the file.safetensors": safetensors({"kind@1": described(0, 128, shape=(32,))}, DATA),
    "offsets of 2**60.safetensors": safetensors({"kind@1": described(1 << 60, (1 << 60) + 64)}, DATA),
    "negative offsets.safetensors": safetensors({"kind@1": described(-64, 0)}, DATA),
    "offsets the wrong way round.safetensors": safetensors({"kind@1": described(64, 0)}, DATA),
    "overlapping offsets.safetensors": safetensors({**ONE, "kind@2": described(32, 96)}, DATA * 2),
    "a hole between tensors.safetensors": safetensors({**ONE, "kind@2": described(96, 160)}, DATA * 3),
    "bytes behind the last tensor.safetensors": safetensors(ONE, DATA + b"more"),
    "a shape that is not its size.safetensors": safetensors({"kind@1": described(0, 64, shape=(15,))}, DATA),
    "a size in bytes that is not its type's.safetensors": safetensors({"kind@1": described(0, 64, "BF16")}, DATA),
    "half a bfloat16 more.safetensors": safetensors({"kind@1": described(0, 33, "BF16")}, DATA[:33]),
    "a negative dimension.safetensors": safetensors({"kind@1": described(0, 64, shape=(-16,))}, DATA),
    "two negative dimensions.safetensors": safetensors({"kind@1": described(0, 64, shape=(-4, -4))}, DATA),
    "a dimension that is no integer.safetensors": safetensors({"kind@1": described(0, 64, shape=(16.0,))}, DATA),
    "a dimension of 2**64.safetensors": safetensors({"kind@1": described(0, 64, shape=(1 << 64,))}, DATA),
    "a dimension of 10,000 digits.safetensors": safetensors(
        json.dumps(ONE).encode().replace(b"[16]", b"[" + b"9" * 10_000 + b"]"), DATA
    ),
    "100,000 dimensions.safetensors": safetensors({"kind@1": described(0, 4, shape=(1,) * 100_000)}, DATA[:4]),
    "no element, a dimension of 2**63.safetensors": safetensors({"kind@1": described(0, 0, shape=(0, 1 << 63))}),
    "no element, a size beyond 64 bits.safetensors": safetensors(
        {"kind@1": described(0, 0, "BF16", shape=(0, 1 << 62, 2))}
    ),
    "a shape nested deeply.safetensors": safetensors(
        json.dumps(ONE).encode().replace(b"[16]", b"[" * 100_000 + b"]" * 100_000), DATA
    ),
    "offsets that are no integers.safetensors": safetensors(
        json.dumps(ONE).encode().replace(b"[0, 64]", b"[0, 64.0]"), DATA
    ),
    "one offset.safetensors": safetensors(json.dumps(ONE).encode().replace(b"[0, 64]", b"[64]"), DATA),
    "half a character in a key.safetensors": safetensors(json.dumps(ONE).encode().replace(b"kind", b"\\ud800"), DATA),
    "bytes after the header's end.safetensors": safetensors(json.dumps(ONE).encode() + b"{}", DATA),
    "a shape that overflows.safetensors": safetensors({"kind@1": described(0, 64, shape=(1 << 63, 1 << 63))}, DATA),
    "no element.safetensors": safetensors({"kind@1": described(0, 0, shape=(0,))}),
    "a scalar.safetensors": safetensors({"kind@1": described(0, 4, shape=())}, DATA[:4]),
    "two dimensions.safetensors": safetensors({"kind@1": described(0, 64, shape=(4, 4))}, DATA),
    "a key twice.safetensors": safetensors(
        json.dumps({**ONE, "kind@2": described(64, 128)}).encode().replace(b"@2", b"@1"), DATA * 2
    ),
    "booleans.safetensors": safetensors({"kind@1": described(0, 16, "BOOL")}, bytes([1] * 16)),
    "complex.safetensors": safetensors({"kind@1": described(0, 128, "C64")}, DATA * 2),
    "float8.safetensors": safetensors({"kind@1": described(0, 16, "F8_E4M3")}, DATA[:16]),
    "scales of float8.safetensors": safetensors({"kind@1": described(0, 16, "F8_E8M0")}, DATA[:16]),
    "four bits.safetensors": safetensors({"kind@1": described(0, 8, "F4")}, DATA[:8]),
    "a type of no name.safetensors": safetensors({"kind@1": described(0, 64, "Q\n9" * 5000)}, DATA),
    "NaN.safetensors": safetensors(ONE, with_value(np.nan)),
    "infinity.safetensors": safetensors(ONE, with_value(-np.inf)),
    "NaN in bfloat16.safetensors": safetensors({"kind@1": described(0, 32, "BF16")}, bfloat16_with(0x7FC1)),
    "infinity in bfloat16.safetensors": safetensors({"kind@1": described(0, 32, "BF16")}, bfloat16_with(0xFF80)),
    "all zeros in bfloat16.safetensors": safetensors({"kind@1": described(0, 32, "BF16")}, b"\0\x80" * 16),
    "more than float32 holds.safetensors": safetensors({"kind@1": described(0, 128, "F64")}, with_value(1e300, "<f8")),
    "less than float32 holds.safetensors": safetensors(
        {"kind@1": described(0, 128, "F64")}, np.full(16, 1e-60).tobytes()
    ),
    "all zeros.safetensors": safetensors(ONE, bytes(64)),
    "a name of 1 MB.safetensors": safetensors({"a" * (1 << 20) + "@1": described(0, 64)}, DATA),
    "a key of 1 MB without a layer.safetensors": safetensors({"a" * (1 << 20): described(0, 64)}, DATA),
    "a name with a line end.safetensors": safetensors({"ki\nnd@1": described(0, 64)}, DATA),
    # GGUF
    "2**63 fields.gguf": gguf(fields_told=1 << 63),
    "2**64 - 1 tensors.gguf": gguf(tensors_told=(1 << 64) - 1),
    "a key of 2**63 bytes.gguf": gguf([text("k", 1 << 63)]),
    "a text of 2**62 bytes.gguf": gguf([text_field("k", "v", 1 << 62)]),
    "an array of 2**60 numbers.gguf": gguf([array_field("k", 0, 1 << 60)]),
    "an array of 2**60 texts.gguf": gguf([array_field("k", 8, 1 << 60)]),
    "an array of 2**60 of nothing.gguf": gguf([array_field("k", 99, 1 << 60)]),
    "arrays nested 10,000 deep.gguf": gguf([array_field("k", 9, 1, struct.pack("<IQ", 9, 1) * 10_000)]),
    "a value of type 13.gguf": gguf([text("k") + struct.pack("<II", 13, 0)]),
    "a key twice.gguf": gguf([text_field("k", "a"), text_field("k", "b")]),
    "a key not UTF-8.gguf": gguf([text_field("k", "v").replace(b"k", b"\xff")]),
    "a name not UTF-8.gguf": gguf([text_field("vllm_steer.name", b"\xff")], [tensor("direction.1")], DATA),
    "a name with a line end.gguf": gguf([text_field("vllm_steer.name", "a\nb")], [tensor("direction.1")], DATA),
    "a name of 1 MB.gguf": gguf([text_field("vllm_steer.name", "a" * (1 << 20))], [tensor("direction.1")], DATA),
    "alignment 0.gguf": gguf([text("general.alignment") + struct.pack("<II", 4, 0)], [tensor("direction.1")], DATA),
    "alignment 2**31.gguf": gguf([text("general.alignment") + struct.pack("<II", 4, 1 << 31)], [tensor("direction.1")]),
    "alignment 3.gguf": gguf([text("general.alignment") + struct.pack("<II", 4, 3)], [tensor("direction.1")], DATA),
    "4 billion dimensions.gguf": gguf(tensors=[tensor("direction.1", dimensions=(1 << 32) - 1)], data=DATA),
    "five dimensions.gguf": gguf(tensors=[tensor("direction.1", shape=(16, 1, 1, 1, 1))], data=DATA),
    "two dimensions.gguf": gguf(tensors=[tensor("direction.1", shape=(4, 4))], data=DATA),
    "a shape that overflows.gguf": gguf(tensors=[tensor("direction.1", shape=(1 << 32, 1 << 32))], data=DATA),
    "no element.gguf": gguf(tensors=[tensor("direction.1", shape=(0,))], data=DATA),
    "a scalar.gguf": gguf(tensors=[tensor("direction.1", shape=())], data=DATA),
    "an offset of 2**63.gguf": gguf(tensors=[tensor("direction.1", offset=1 << 63)], data=DATA),
    "values beyond the file.gguf": gguf(tensors=[tensor("direction.1", offset=32)], data=DATA),
    "a layer twice.gguf": gguf(tensors=[tensor("direction.1"), tensor("direction.1")], data=DATA),
    "quantised.gguf": gguf(tensors=[tensor("direction.1", kind=8)], data=DATA),
    "a type of no name.gguf": gguf(tensors=[tensor("direction.1", kind=12345)], data=DATA),
    "NaN.gguf": gguf(tensors=[tensor("direction.1")], data=with_value(np.nan)),
    "NaN in bfloat16.gguf": gguf(tensors=[tensor("direction.1", kind=30)], data=bfloat16_with(0x7FC1)),
    "more than float32 holds.gguf": gguf(tensors=[tensor("direction.1", kind=28)], data=with_value(1e300, "<f8")),
    "bfloat16 beyond the file.gguf": gguf(tensors=[tensor("direction.1", kind=30)], data=DATA[:31]),
    "float64 beyond the file.gguf": gguf(tensors=[tensor("direction.1", kind=28)], data=DATA),
    "whole numbers.gguf": gguf(tensors=[tensor("direction.1", kind=26)], data=DATA),
    "no element, a dimension of 2**63.gguf": gguf(tensors=[tensor("direction.1", shape=(0, 1 << 63))], data=DATA),
    "all zeros.gguf": gguf(tensors=[tensor("direction.1")], data=bytes(64)),
    "no direction.gguf": gguf(tensors=[tensor("direction.x")], data=DATA),
    "version 1.gguf": gguf(tensors=[tensor("direction.1")], data=DATA, version=1),
    "version 2**32 - 1.gguf": gguf(tensors=[tensor("direction.1")], data=DATA, version=(1 << 32) - 1),
    **{
        f"{name}{ending}": content
        for ending in ENDINGS
        for name, content in {"empty": b"", "zeros": bytes(64), "a zip archive": b"PK\x03\x04" + bytes(60)}.items()
    },
}
