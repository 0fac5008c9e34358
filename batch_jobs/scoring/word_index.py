"""An index that numbers the distinct words of a thousand texts.

Work that Python would do for every word of every text then runs on arrays, or once per distinct word. All results are
exact: words are numbered, not hashed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_jobs.config.concept import Match
from batch_jobs.scoring.outcome import occurs
from batch_jobs.scoring.word_counts import WordCounts
from batch_jobs.scoring.word_split import split_words

_Numbers = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]

_CELLS = 1 << 15
"""Words sorted at a time: 256 KiB, which stays in a core's cache."""
_KEYS = 1 << 63
"""Numbers that int64 tells apart."""


class WordIndex:
    """The words of `texts` (N strings, no nulls), split as by `str.split`."""

    def __init__(self, texts: pa.Array) -> None:
        self._texts = texts
        words, self._lengths = split_words(texts)
        encoded = words.dictionary_encode()
        self._numbers: _Numbers = encoded.indices.to_numpy().astype(np.int64)
        self._size = len(encoded.dictionary)
        # Words hold no line end, so a part of a word can be looked for in all words at once. str.lower, since Arrow's
        # lowering differs for letters such as "İ" and a final "Σ".
        self._joined = "\n".join(encoded.dictionary.to_pylist()).lower()
        self._vocabulary = self._joined.split("\n")
        self._ends = np.cumsum(np.fromiter(map(len, self._vocabulary), np.int64, len(self._vocabulary)) + 1)
        # the texts that hold word w: _holders[_first[w] : _first[w + 1]]
        narrow = np.uint16 if self._size <= 1 << 16 else np.int64  # NumPy sorts 16 bits in linear time
        by_word = np.argsort(self._numbers.astype(narrow), kind="stable")
        self._holders = np.repeat(np.arange(len(texts)), self._lengths)[by_word]
        self._first = np.concatenate([[0], np.cumsum(np.bincount(self._numbers, minlength=self._size))])
        self._found: dict[str, _Numbers] = {}

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._texts)

    def counts(self) -> Iterator[WordCounts]:
        """The counts of each text, in order."""
        grams = np.maximum(self._lengths - 3, 0)
        repeated = grams - self._distinct(self._gram_keys(), grams)
        columns = (self._lengths, self._distinct(self._numbers, self._lengths), grams, repeated)
        return map(WordCounts, *(column.tolist() for column in columns))

    def count_found(
        self,
        keywords: Collection[str],
        within: _Flags | None = None,
        match: Match = "substring",
    ) -> _Numbers:
        """(N,) int64: how many distinct `keywords` occur in each text, in any case.

        Args:
            keywords: words or phrases.
            within: (N,) bool; texts outside it count 0.
            match: where a keyword may be found; see `batch_jobs.scoring.outcome.occurs`.
        """
        found = np.zeros(len(self._texts), dtype=np.int64)
        for keyword in {keyword.lower() for keyword in keywords}:
            parts = keyword.split()
            if parts == [keyword]:
                holds = self._texts_with(keyword, match)
            else:  # the keyword spans words, whose order in the text must be checked
                holds = np.ones(len(self._texts), dtype=np.bool_)
                if parts:  # the longest is in the fewest texts
                    holds = self._texts_with(max(parts, key=len), "substring")
            if within is not None:
                holds &= within
            if parts != [keyword]:
                for row in np.flatnonzero(holds):
                    holds[row] = occurs(keyword, self._texts[row].as_py().lower(), match)
            found += holds
        return found

    def _texts_with(self, part: str, match: Match) -> _Flags:
        """(N,) bool: which texts have a word that contains `part`, in lower case, where `match` says."""
        holds = np.zeros(len(self._texts), dtype=np.bool_)
        for word in self._words_with(part):
            # a word's ends are white space, so looking at the word alone is enough
            if match == "substring" or occurs(part, self._vocabulary[word], match):
                holds[self._holders[self._first[word] : self._first[word + 1]]] = True
        return holds

    def _words_with(self, part: str) -> _Numbers:
        """Numbers of the words that contain `part`, in lower case."""
        if part in self._found:  # asked for again with another match
            return self._found[part]
        places = []
        place = self._joined.find(part)
        while place >= 0:
            places.append(place)
            place = self._joined.find(part, place + len(part))
        self._found[part] = np.unique(np.searchsorted(self._ends, places, side="right"))
        return self._found[part]

    def _gram_keys(self) -> _Numbers:
        """A key for each word but the last three: equal where that word and the next three are equal."""
        pairs, size = self._numbers[:-1] * self._size + self._numbers[1:], self._size**2
        if size**2 > _KEYS:
            pairs = _renumber(pairs)
            size = len(pairs)
        return pairs[:-2] * size + pairs[2:]

    def _distinct(self, keys: _Numbers, lengths: _Numbers) -> _Numbers:
        """(N,) int64: how many distinct keys each text has, whose keys begin where its words do; `lengths`: how many.

        Texts of about one length are sorted side by side, which is much faster than one sort over all.
        """
        begins = np.cumsum(self._lengths) - self._lengths
        distinct = np.zeros(len(lengths), dtype=np.int64)
        order = np.argsort(lengths)[::-1]
        order = order[: np.count_nonzero(lengths)]
        while len(order):
            width = int(lengths[order[0]])
            rows, order = np.split(order, [max(1, _CELLS // width)])
            columns = np.arange(width)
            places = np.minimum(begins[rows, np.newaxis] + columns, len(keys) - 1)
            block = np.where(columns < lengths[rows, np.newaxis], keys[places], -1)  # -1 comes first when sorted
            block.sort(axis=1)
            distinct[rows] = np.count_nonzero(np.diff(block, axis=1, prepend=-1), axis=1)
        return distinct


def _renumber(keys: _Numbers) -> _Numbers:
    """The keys renumbered from 0 without gaps, so that two of them still fit into one int64."""
    indices: npt.NDArray[np.int32] = pa.array(keys).dictionary_encode().indices.to_numpy()
    return indices.astype(np.int64)
