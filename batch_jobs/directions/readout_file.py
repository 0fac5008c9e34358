"""The readouts of a study's texts and the file that stores them. Directions and validation are computed from them.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from batch_jobs.files.atomic import atomic_file
from vllm_steer.errors import SteerError

Floats = npt.NDArray[np.floating[Any]]

TextSet = Literal["train_positive", "train_negative", "test_positive", "test_negative", "test_positive_ablated"]
"""Split and class of the texts. The last set is `test_positive` with its empathy words replaced."""

_METADATA_KEY = "vllm_steer_readouts"
_FORMAT = 2
_FIRST_FORMAT = 1
"""Files of this format differ in the names of the text sets alone."""


class ReadoutFileError(SteerError):
    """A readout file, or readouts looked up in it, are missing or unusable; the message says what is there."""


@dataclass(frozen=True)
class PairReadouts:
    """Readouts of both sides of the pairs at one block, row for row."""

    positive_ND: Floats
    """(N, D)."""
    negative_ND: Floats
    """(N, D)."""


def rows_of(pairs: PairReadouts, rows: npt.NDArray[np.intp]) -> PairReadouts:
    """The pairs at `rows`."""
    return PairReadouts(pairs.positive_ND[rows], pairs.negative_ND[rows])


@dataclass(frozen=True)
class ReadText:
    """One text that was read: its identity, without its words."""

    pair_id: str
    sha256: str
    """Hex digest of the text's UTF-8 before the cut to `extract.max_tokens`. Equal digests: two runs read the same
    text."""
    num_tokens: int
    """Tokens of the text that were read. The mean of a pooling that skips k is over k fewer."""
    replacements: int = 0
    """Empathy words replaced in the text; 0 outside `test_positive_ablated`."""


def text_digest(text: str) -> str:
    """`ReadText.sha256` of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


class ReadoutKey(NamedTuple):
    """Key of one array of readouts."""

    text_set: TextSet
    skip_first: int
    """Leading tokens left out of the mean."""
    block: int
    """Decoder block (0-based) whose output was read."""

    @property
    def tensor(self) -> str:
        """Name of the array in the file."""
        return f"{self.text_set}/skip_first_{self.skip_first}/block_{self.block}"


@dataclass(frozen=True)
class StudyReadouts:
    """Readouts of all texts of a study, at every block read, under every pooling."""

    texts: dict[TextSet, tuple[ReadText, ...]]
    """Text set -> the text of each row. Without lexical ablation, `test_positive_ablated` is absent."""
    arrays: dict[ReadoutKey, npt.NDArray[np.float32]]
    """(N, D) float32 for every text set × pooling × block."""

    @cached_property
    def poolings(self) -> tuple[int, ...]:
        """The `skip_first` values read, ascending; the first is 0 (all tokens)."""
        return tuple(sorted({key.skip_first for key in self.arrays}))

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks read, ascending."""
        return tuple(sorted({key.block for key in self.arrays}))

    def train(self, skip_first: int, block: int) -> PairReadouts:
        """The pairs that make directions.

        Raises:
            ReadoutFileError: there are no readouts at `block` with `skip_first`.
        """
        return self._pairs("train_positive", "train_negative", skip_first, block)

    def test(self, skip_first: int, block: int) -> PairReadouts:
        """The held-out pairs.

        Raises:
            ReadoutFileError: there are no readouts at `block` with `skip_first`.
        """
        return self._pairs("test_positive", "test_negative", skip_first, block)

    def all_pairs(self, skip_first: int, block: int) -> PairReadouts:
        """The pairs of both, the train pairs first.

        Raises:
            ReadoutFileError: there are no readouts at `block` with `skip_first`.
        """
        train, test = self.train(skip_first, block), self.test(skip_first, block)
        return PairReadouts(
            np.concatenate([train.positive_ND, test.positive_ND]), np.concatenate([train.negative_ND, test.negative_ND])
        )

    def ablated_test(self, skip_first: int, block: int) -> PairReadouts:
        """The held-out pairs, with the empathy words of the positive side replaced.

        Raises:
            ReadoutFileError: there are no readouts at `block` with `skip_first`, or no ablated texts.
        """
        return self._pairs("test_positive_ablated", "test_negative", skip_first, block)

    def _pairs(self, positive: TextSet, negative: TextSet, skip_first: int, block: int) -> PairReadouts:
        return PairReadouts(self._array(positive, skip_first, block), self._array(negative, skip_first, block))

    def _array(self, text_set: TextSet, skip_first: int, block: int) -> npt.NDArray[np.float32]:
        try:
            return self.arrays[ReadoutKey(text_set, skip_first, block)]
        except KeyError:
            raise ReadoutFileError(
                f"There are no readouts of {text_set} at block {block} with skip_first {skip_first}; there are text "
                f"sets {', '.join(self.texts)}, blocks {list(self.blocks)}, skip_first {list(self.poolings)}. Read "
                "the texts again (--overwrite)."
            ) from None


def write_readouts(path: Path, readouts: StudyReadouts) -> None:
    """Write a safetensors file atomically: one (N, D) float32 tensor per key, the texts as JSON in the metadata."""
    about = {
        "format": _FORMAT,
        "texts": {text_set: [asdict(text) for text in texts] for text_set, texts in readouts.texts.items()},
    }
    with atomic_file(path) as part:
        save_file(
            {key.tensor: np.ascontiguousarray(array, dtype=np.float32) for key, array in readouts.arrays.items()},
            part,
            metadata={_METADATA_KEY: json.dumps(about, sort_keys=True)},
        )


def read_readouts(path: Path) -> StudyReadouts:
    """Read a file of `write_readouts`.

    Raises:
        ReadoutFileError: the file is absent or malformed, or its arrays do not cover every text set, pooling and block;
            the message names the file.
    """
    if not path.is_file():
        raise ReadoutFileError(f"There is no readout file {path}; run the study's extraction first.")
    try:
        with safe_open(str(path), framework="numpy") as tensors:
            about = json.loads((tensors.metadata() or {})[_METADATA_KEY])
            if about["format"] not in (_FORMAT, _FIRST_FORMAT):
                raise ValueError(f"format {about['format']!r}, not {_FORMAT}")
            renamed = _current_name if about["format"] == _FIRST_FORMAT else str
            texts = _texts({renamed(name): stored for name, stored in about["texts"].items()})
            arrays = {_key(renamed(name)): tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReadoutFileError(
            f"{path} is not a readout file of this version ({error!r}); read the texts again (--overwrite)."
        ) from error
    readouts = StudyReadouts(texts, arrays)
    _check_complete(path, readouts)
    return readouts


def _current_name(name: str) -> str:
    return name.replace("non_empathic", "negative").replace("empathic", "positive")


def _texts(stored: Mapping[str, Any]) -> dict[TextSet, tuple[ReadText, ...]]:
    return {name: tuple(ReadText(**text) for text in stored[name]) for name in get_args(TextSet) if name in stored}


def _key(tensor: str) -> ReadoutKey:
    text_set, skip_first, block = tensor.split("/")
    if text_set not in get_args(TextSet):
        raise ValueError(f"unknown text set {text_set!r}")
    return ReadoutKey(
        text_set,  # type: ignore[arg-type]  # checked above
        int(skip_first.removeprefix("skip_first_")),
        int(block.removeprefix("block_")),
    )


def _check_complete(path: Path, readouts: StudyReadouts) -> None:
    sizes = {array.shape[-1] for array in readouts.arrays.values()}
    for key in map(ReadoutKey._make, product(readouts.texts, readouts.poolings, readouts.blocks)):
        array = readouts.arrays.get(key)
        expected = len(readouts.texts[key.text_set])
        if array is None or array.ndim != 2 or len(array) != expected or len(sizes) != 1:
            got = "nothing" if array is None else f"shape {array.shape}"
            raise ReadoutFileError(
                f"{path}: got {got} for {key.tensor}; it must be ({expected}, D), D the same in the whole file. Read "
                "the texts again (--overwrite)."
            )
    if not readouts.arrays:
        raise ReadoutFileError(f"{path}: holds no readouts; read the texts again (--overwrite).")
