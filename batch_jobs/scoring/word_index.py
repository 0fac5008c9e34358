"""An index that numbers the distinct words of a thousand texts.

Work that Python would do for every word of every text then runs on arrays, or once per distinct word. All results are
exact: words are numbered, not hashed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.config.concept import Match
from batch_jobs.scoring.outcome import occurs
from batch_jobs.scoring.word_counts import WordCounts

_Numbers = npt.NDArray[np.int64]


class WordIndex:
    """The words of `texts` (N strings, no nulls), split as by `str.split`."""

    def __init__(self, texts: pa.Array) -> None:
        self._texts = texts
        # Arrow splits at exactly the code points of str.split. The texts are trimmed, because Arrow reads one code
        # point past a text that ends in white space and, if that is no UTF-8, counts the white space as part of a word.
        split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
        encoded = split.values.dictionary_encode()
        rows = np.repeat(np.arange(len(texts)), pc.list_value_length(split).to_numpy())
        numbers = encoded.indices.to_numpy().astype(np.int64)
        # Arrow, unlike str.split, gives an empty word for an empty text
        real = (pc.binary_length(encoded.dictionary).to_numpy() > 0)[numbers]
        self._rows, self._numbers = rows[real], numbers[real]
        # str.lower, since Arrow's lowering differs for letters such as "İ" and a final "Σ"
        self._vocabulary = pa.array([word.lower() for word in encoded.dictionary.to_pylist()], pa.string())

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._texts)

    def counts(self) -> Iterator[WordCounts]:
        """The counts of each text, in order."""
        size = len(self._texts)
        words = np.bincount(self._rows, minlength=size)
        distinct = self._distinct(self._rows, self._rows * len(self._vocabulary) + self._numbers)
        pairs = _renumber(self._numbers[:-1] * len(self._vocabulary) + self._numbers[1:])
        rows, base = self._rows[3:], len(pairs)
        # three numbers in 63 bits: enough for a thousand texts of 90,000 words each
        grams = (rows * base + pairs[:-2]) * base + pairs[2:]
        whole = rows == self._rows[: len(rows)]  # the 4-gram begins and ends in the same text
        counts = np.maximum(words - 3, 0)
        repeated = counts - self._distinct(rows[whole], grams[whole])
        return map(WordCounts, *(column.tolist() for column in (words, distinct, counts, repeated)))

    def count_found(
        self,
        keywords: Collection[str],
        within: npt.NDArray[np.bool_] | None = None,
        match: Match = "substring",
    ) -> _Numbers:
        """(N,) int64: how many distinct `keywords` occur in each text, in any case.

        Args:
            keywords: words or phrases.
            within: (N,) bool; texts outside it count 0.
            match: where a keyword may be found; see `batch_jobs.scoring.outcome.occurs`.
        """
        lowered = {keyword.lower() for keyword in keywords}
        parts_of = {keyword: keyword.split() for keyword in lowered}
        whole = {keyword for keyword in lowered if parts_of[keyword] == [keyword]}
        # the parts of a phrase are only looked for as substrings: its place in the text is checked below
        holding = self._texts_holding({part for keyword in lowered - whole for part in parts_of[keyword]}, "substring")
        exact = self._texts_holding(whole, match)
        found = np.zeros(len(self._texts), dtype=np.int64)
        for keyword in lowered:
            holds = np.ones(len(self._texts), dtype=np.bool_) if within is None else within.copy()
            if keyword in whole:
                holds &= exact[keyword]
            else:  # the keyword spans words, whose order in the text must be checked
                for part in parts_of[keyword]:
                    holds &= holding[part]
                for row in np.flatnonzero(holds):
                    holds[row] = occurs(keyword, self._texts[row].as_py().lower(), match)
            found += holds
        return found

    def _texts_holding(self, parts: Collection[str], match: Match) -> dict[str, npt.NDArray[np.bool_]]:
        """Lower-case part of a word -> (N,) bool: which texts have a word that contains it, where `match` says."""
        matches = {part: self._words_holding(part, match) for part in parts}
        anything = np.zeros(len(self._vocabulary), dtype=np.bool_)
        for found in matches.values():
            anything |= found
        places = np.flatnonzero(anything[self._numbers])  # few, so the rest is cheap
        rows, numbers = self._rows[places], self._numbers[places]
        return {
            part: np.bincount(rows[found[numbers]], minlength=len(self._texts)) > 0 for part, found in matches.items()
        }

    def _words_holding(self, part: str, match: Match) -> npt.NDArray[np.bool_]:
        """(V,) bool over the vocabulary. A word's ends are white space, so looking at the word alone is enough."""
        holds: npt.NDArray[np.bool_] = pc.match_substring(self._vocabulary, part).to_numpy(zero_copy_only=False).copy()
        if match != "substring":
            for place in np.flatnonzero(holds):
                holds[place] = occurs(part, self._vocabulary[place].as_py(), match)
        return holds

    def _distinct(self, rows: _Numbers, keys: _Numbers) -> _Numbers:
        """Number of distinct keys of each text. `rows` ascend, and keys of a later row are greater."""
        keys = np.sort(keys)
        first = np.ones(len(keys), dtype=np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=first[1:])
        return np.bincount(rows[first], minlength=len(self._texts))


def _renumber(keys: _Numbers) -> _Numbers:
    """The keys renumbered from 0 without gaps, so that two of them still fit into one int64."""
    indices: npt.NDArray[np.int32] = pa.array(keys).dictionary_encode().indices.to_numpy()
    return indices.astype(np.int64)
