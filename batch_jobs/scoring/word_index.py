"""The words of a thousand texts, each known by a number, so that what Python would do once for every word of every
text is done in arrays, or once for every distinct word. Every answer is exact: numbers are given, not hashed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.scoring.word_counts import WordCounts

_Numbers = npt.NDArray[np.int64]


class WordIndex:
    """The words of `texts` (strings, without null) as `str.split` gives them."""

    def __init__(self, texts: pa.Array) -> None:
        self._texts = texts
        # White space is the same as for str.split, to the last code point. Trimmed, because Arrow looks one code point
        # past a text that ends in white space, and takes the white space for a part of the word where it finds no UTF-8
        split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
        encoded = split.values.dictionary_encode()
        rows = np.repeat(np.arange(len(texts)), pc.list_value_length(split).to_numpy())
        numbers = encoded.indices.to_numpy().astype(np.int64)
        # unlike str.split, the other gives an empty word for a text that is empty
        real = (pc.binary_length(encoded.dictionary).to_numpy() > 0)[numbers]
        self._rows, self._numbers = rows[real], numbers[real]
        # str.lower, since Arrow's has other rules for letters such as "İ" and a final "Σ"
        self._vocabulary = pa.array([word.lower() for word in encoded.dictionary.to_pylist()], pa.string())

    def counts(self) -> Iterator[WordCounts]:
        """The counts of each text."""
        size = len(self._texts)
        words = np.bincount(self._rows, minlength=size)
        distinct = self._distinct(self._rows, self._rows * len(self._vocabulary) + self._numbers)
        pairs = _renumber(self._numbers[:-1] * len(self._vocabulary) + self._numbers[1:])
        rows, base = self._rows[3:], len(pairs)
        # three numbers in 63 bits: room for a thousand texts of 90,000 words each
        grams = (rows * base + pairs[:-2]) * base + pairs[2:]
        whole = rows == self._rows[: len(rows)]  # not begun in one text and ended in the next
        counts = np.maximum(words - 3, 0)
        repeated = counts - self._distinct(rows[whole], grams[whole])
        return map(WordCounts, *(column.tolist() for column in (words, distinct, counts, repeated)))

    def count_found(self, keywords: Collection[str], within: npt.NDArray[np.bool_] | None = None) -> _Numbers:
        """For each text, how many distinct `keywords` occur in it (case ignored, matched as substrings); 0 for texts
        outside `within`, where given."""
        lowered = {keyword.lower() for keyword in keywords}
        holding = self._texts_holding({part for keyword in lowered for part in keyword.split()})
        found = np.zeros(len(self._texts), dtype=np.int64)
        for keyword in lowered:
            parts = keyword.split()
            holds = np.ones(len(self._texts), dtype=np.bool_) if within is None else within.copy()
            for part in parts:
                holds &= holding[part]
            if parts != [keyword]:  # it spans words, so that its parts need not stand together
                for row in np.flatnonzero(holds):
                    holds[row] = keyword in self._texts[row].as_py().lower()
            found += holds
        return found

    def _texts_holding(self, parts: Collection[str]) -> dict[str, npt.NDArray[np.bool_]]:
        """For each part of a word, lowercase: which texts have a word that holds it."""
        matches = {part: pc.match_substring(self._vocabulary, part).to_numpy(zero_copy_only=False) for part in parts}
        anything = np.zeros(len(self._vocabulary), dtype=np.bool_)
        for match in matches.values():
            anything |= match
        places = np.flatnonzero(anything[self._numbers])  # few, so that the rest is cheap
        rows, numbers = self._rows[places], self._numbers[places]
        return {
            part: np.bincount(rows[match[numbers]], minlength=len(self._texts)) > 0 for part, match in matches.items()
        }

    def _distinct(self, rows: _Numbers, keys: _Numbers) -> _Numbers:
        """How many distinct keys each text has; `rows` ascend, and keys of a later row are greater."""
        keys = np.sort(keys)
        first = np.ones(len(keys), dtype=np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=first[1:])
        return np.bincount(rows[first], minlength=len(self._texts))


def _renumber(keys: _Numbers) -> _Numbers:
    """The same keys as numbers from 0 up without a gap, so that two of them still fit into one."""
    indices: npt.NDArray[np.int32] = pa.array(keys).dictionary_encode().indices.to_numpy()
    return indices.astype(np.int64)
