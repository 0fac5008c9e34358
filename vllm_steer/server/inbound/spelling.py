"""Which names of fields and headers are meant to be the plugin's: other forms of them, and misspellings."""

from __future__ import annotations

import re
from functools import lru_cache

# Also after punctuation: a client that splits JSON at its commas sends keys such as '{"steering": [{"direction": "x"'.
_OTHER_FORM = re.compile(r"[\W_]*(x[-_ ]?)?(vllm[-_ ]?)?(steer|read[-_ ]?outs?(\W|$))", re.IGNORECASE)
_HEADER_START = re.compile(r"x[-_]?(?=.)", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\W_]+")
_LONGEST = 40  # characters; no misspelling has more
_MOST_EDITS = {"steering": 2, "readout": 1, "readouts": 1, "vllmsteer": 1, "vllmsteering": 2, "vllmreadout": 2}
"""Name without separators -> the most edits at which another name is taken for a misspelling of it."""
_WORDS = frozenset({"string", "storing", "stemming", "steaming", "staring", "sterling"})
"""English words within these distances, which other software may use as names."""


def is_like_ours(name: str, most_edits: int = 2) -> bool:
    """Whether whoever wrote this name of a field meant ``steering``, ``readout`` or ``vllm_steer``.

    Args:
        name: any name but the right ones.
        most_edits: the most edits of a misspelling, if fewer than the names themselves allow: 1 among names of which
            many are the user's own.
    """
    return _OTHER_FORM.match(name) is not None or _is_misspelt(name[:_LONGEST], most_edits)


def is_header_like_ours(name: str) -> bool:
    """Whether whoever wrote this name of a header meant ``X-Steering``."""
    return is_like_ours(name) or _is_misspelt(_HEADER_START.sub("", name[:_LONGEST], count=1), 2)


@lru_cache(maxsize=4096)
def _is_misspelt(name: str, most_edits: int) -> bool:
    plain = _SEPARATORS.sub("", name).lower()
    return plain not in _WORDS and any(
        edits(plain, ours, most := min(allowed, most_edits)) <= most for ours, allowed in _MOST_EDITS.items()
    )


def edits(one: str, other: str, most: int) -> int:
    """Letters to insert, remove or replace, or neighbours to swap, to make one word of the other; each letter once.

    It is the optimal string alignment distance.

    Args:
        one: a word.
        other: another word.
        most: a larger distance may be returned as any number above this.
    """
    if abs(len(one) - len(other)) > most:
        return most + 1
    before, row = [], list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, above, row = row, before, [i]
        for j, wanted in enumerate(other, start=1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
