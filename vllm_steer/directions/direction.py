"""A named direction of one layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.errors import BadVector, MalformedSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}")
MOST_LAYERS = 1_000_000  # the keys of direction files have six digits for it
_FLOAT32 = np.finfo(np.float32)

# Unit vectors from float16 files have norms off by up to 1e-3 (half an ulp, summed over some thousand elements). A norm
# off by more than ten times that is not meant to be 1.
UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Direction:
    """A named vector that belongs to one layer of one model.

    Args:
        name: letters, digits and ``. _ : / + -``, at most 128.
        layer: 0-based decoder block in whose output residual stream the vector lives, below 1,000,000.
        vector: (D,) real numbers: a NumPy array of any real dtype, a sequence, or a PyTorch tensor on any device,
            also in bfloat16 or with gradients. Kept as a read-only float32 copy, which holds float16, bfloat16 and
            float32 exactly. It is never rescaled: α multiplies it as it is. Every op but ``add`` needs a unit vector;
            ``normalised()`` makes one.
        metadata: where it comes from: names with texts, numbers, ``True``, ``False`` or ``None``. It changes nothing;
            safetensors files keep it.

    Raises:
        BadVector: the vector is not one-dimensional, not finite in float32, or zero in float32.
        MalformedSpec: the name, layer or metadata is not allowed.
    """

    name: str
    layer: int
    vector: npt.NDArray[np.float32]
    metadata: Mapping[str, str | float | bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise MalformedSpec(
                f"direction name is {self.name!r:.{MOST_QUOTED}}; allowed: 1 to 128 letters, digits and . _ : / + -, "
                "the first a letter or digit. Rename it."
            )
        is_whole = isinstance(self.layer, int | np.integer) and not isinstance(self.layer, bool)
        if not is_whole or not 0 <= self.layer < MOST_LAYERS:
            raise MalformedSpec(
                f"direction {self.name!r} has layer {self.layer!r:.{MOST_QUOTED}}; allowed: a whole number from 0 to "
                f"{MOST_LAYERS - 1}. Give the 0-based index of its decoder block."
            )
        object.__setattr__(self, "layer", int(self.layer))
        if not isinstance(self.metadata, Mapping) or not all(
            isinstance(key, str) and isinstance(value, str | int | float | None) for key, value in self.metadata.items()
        ):
            raise MalformedSpec(
                f"direction {self.name!r} has metadata {self.metadata!r:.{MOST_QUOTED}}; allowed: names with texts, "
                "numbers, true, false or none. Leave the rest out."
            )
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        vector = self._as_float32(self._array())
        vector.setflags(write=False)
        object.__setattr__(self, "vector", vector)

    def _array(self) -> npt.NDArray[Any]:
        """The given vector as a (D,) array of real numbers, D > 0."""
        try:
            given = np.asarray(_on_host(self.vector))
        # RuntimeError and AttributeError: raised by tensors of other libraries
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise BadVector(
                f"direction {self.name!r} has a vector that NumPy cannot read ({one_line(error)}); allowed: (D,) real "
                "numbers. Give a float32 array."
            ) from None
        if given.dtype.kind not in "fiu":
            raise BadVector(
                f"direction {self.name!r} has a vector of {given.dtype!s:.{MOST_QUOTED}}; allowed: real numbers. "
                "Give a float32 array."
            )
        if given.ndim != 1 or given.size == 0:
            raise BadVector(
                f"direction {self.name!r} has a vector of shape {given.shape}; allowed: (D,) with D the hidden size. "
                f"{_how_to_reshape(given)}"
            )
        return given

    def _as_float32(self, given: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            vector = np.array(given, dtype=np.float32, order="C")  # a copy, not the caller's array
        if not np.isfinite(given).all():
            raise BadVector(
                f"direction {self.name!r} has {np.count_nonzero(~np.isfinite(given))} values that are NaN or infinite; "
                "allowed: finite values. Extract it again."
            )
        if not given.any():
            raise BadVector(
                f"direction {self.name!r} is all zeros; allowed: a vector with a direction. Extract it again."
            )
        if not np.isfinite(vector).all() or not vector.any():
            largest = np.abs(given).max()
            raise BadVector(
                f"direction {self.name!r} has values of up to {largest:.3g}, which float32 cannot hold; allowed: a "
                f"largest value between {_FLOAT32.smallest_subnormal:.3g} and {_FLOAT32.max:.3g}. Divide it by its "
                "largest absolute value."
            )
        return vector

    @property
    def key(self) -> str:
        """``name@layer``, unique in a file and in an engine."""
        return f"{self.name}@{self.layer}"

    @cached_property
    def norm(self) -> float:
        """Euclidean norm of the vector."""
        return float(np.linalg.norm(self.vector.astype(np.float64)))

    @property
    def is_unit(self) -> bool:
        """Whether the norm is 1 to within ``UNIT_TOLERANCE``."""
        return abs(self.norm - 1.0) <= UNIT_TOLERANCE

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the vector's float32 little-endian bytes; name and layer are not included."""
        return content_hash(self.vector)

    def normalised(self) -> Direction:
        """The same direction with norm 1."""
        vector = (self.vector.astype(np.float64) / self.norm).astype(np.float32)
        return Direction(self.name, self.layer, vector, self.metadata)


def content_hash(vector: npt.NDArray[np.float32]) -> str:
    """``Direction.content_hash`` of a (D,) contiguous float32 vector."""
    return sha256(vector.astype("<f4", copy=False).data).hexdigest()


def _on_host(vector: Any) -> Any:
    """Convert a PyTorch tensor to a NumPy array with the same values; return anything else unchanged.

    A tensor is recognised by its methods, because PyTorch need not be installed here. NumPy refuses tensors that have a
    gradient or live on an accelerator. It has no bfloat16 and no float8; float32 holds both exactly.
    """
    if not hasattr(vector, "detach") or not hasattr(vector, "is_floating_point"):
        return vector
    tensor = vector.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < _FLOAT32.dtype.itemsize:
        tensor = tensor.float()
    return tensor.resolve_neg().numpy()


def _how_to_reshape(given: npt.NDArray[Any]) -> str:
    if given.size == 0 or given.ndim == 0:
        return "Extract it again."
    if given.size == max(given.shape):
        return "Flatten it with reshape(-1)."
    return "Make one direction of each row."
