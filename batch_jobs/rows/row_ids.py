"""Sets of row ids that take eight bytes an id, so that a million finished rows take 8 MB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Keys = npt.NDArray[np.uint64]
"""Row ids as numbers; equal where the ids are equal."""

_HEX_ID = "^[0-9a-f]{16}$"


def keys_of(ids: pa.Array | pa.ChunkedArray) -> Keys:
    """(N,) the keys of N row ids, which are not null: the number that 16 hex digits spell, or 8 bytes of the SHA-256 of
    an id of another form."""
    chunks = ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]
    return np.concatenate([np.empty(0, np.uint64), *map(_keys_of_chunk, chunks)])


def _keys_of_chunk(ids: pa.Array) -> Keys:
    if not pc.all(pc.match_substring_regex(ids, _HEX_ID)).as_py():
        return np.array([_key(row_id) for row_id in ids.to_pylist()], dtype=np.uint64)
    digits = bytes.fromhex("".join(ids.to_pylist()))
    return np.frombuffer(digits, dtype=">u8").astype(np.uint64)


def _key(row_id: str) -> int:
    if len(row_id) == 16 and not row_id.strip("0123456789abcdef"):
        return int(row_id, 16)
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8])


def _sorted_set(keys: Sequence[Keys]) -> Keys:
    """The distinct keys, ascending. `np.unique` would take several copies."""
    together: Keys = np.concatenate([np.empty(0, np.uint64), *keys])
    together.sort()
    repeated = together[1:] == together[:-1]
    return together[np.append(True, ~repeated)] if repeated.any() else together


class RowIds:
    """A set of row ids, of which only the keys are kept."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        """From the ids themselves; see `of_keys` for many."""
        self._keys = _sorted_set([keys_of(pa.array(list(ids), pa.string()))])

    @classmethod
    def of_keys(cls, keys: Sequence[Keys]) -> RowIds:
        """From arrays of keys in any order."""
        made = cls()
        made._keys = _sorted_set(keys)
        return made

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, row_id: str) -> bool:
        return bool(self.holds(np.array([_key(row_id)], dtype=np.uint64))[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowIds) and np.array_equal(self._keys, other._keys)

    def __hash__(self) -> int:
        return hash(self._keys.tobytes())

    def __or__(self, other: RowIds) -> RowIds:
        return RowIds.of_keys([self._keys, other._keys]) if len(other) else self

    def meets(self, other: RowIds) -> bool:
        """Whether an id is in both sets."""
        return bool(self.holds(other._keys).any())

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """(N,) bool: which of the keys are in the set."""
        if not len(self._keys):
            return np.zeros(len(keys), dtype=np.bool_)
        places = np.searchsorted(self._keys, keys)
        held: npt.NDArray[np.bool_] = self._keys[np.minimum(places, len(self._keys) - 1)] == keys
        return held
