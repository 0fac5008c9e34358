"""ETags of directions and the conditions that a request can put on them (RFC 9110, sections 8.8.3 and 13.1)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from vllm_steer.engine.registry import DirectionBook, Registered
from vllm_steer.errors import DirectionChanged

_ENTITY_TAG = re.compile(r'(W/)?("[^"]*")')


def entries_of(book: DirectionBook, name: str, layer: int | None) -> list[Registered]:
    """The registered directions of a name, at one layer or at all, by layer; empty if there are none."""
    return [one for one in book.all() if one.name == name and layer in (None, one.layer)]


def etag_of(entries: Sequence[Registered]) -> str:
    """A strong ETag, quoted: the content hash of one direction, or a hash over layers and content hashes of several."""
    if len(entries) == 1:
        return f'"{entries[0].content_hash}"'
    told = json.dumps([[one.layer, one.content_hash] for one in entries])
    return f'"{sha256(told.encode()).hexdigest()}"'


@dataclass(frozen=True, slots=True)
class Preconditions:
    """The conditions of one request, from its headers.

    Attributes:
        if_match: the current ETag must be one of these; ``*`` means that anything is registered.
        if_none_match: the current ETag must be none of these; ``*`` means that nothing is registered.
    """

    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, entries: Sequence[Registered]) -> None:
        """Check both conditions against the registered directions.

        Raises:
            DirectionChanged: a condition does not hold.
        """
        is_now = f"the current ETag is {etag_of(entries)}" if entries else "nothing is registered there"
        if self.if_match is not None and not _names(self.if_match, entries, weak=False):
            raise DirectionChanged(
                f"If-Match is {self.if_match}, but {is_now}; allowed: the current ETag. Fetch the direction again."
            )
        if self.if_none_match is not None and _names(self.if_none_match, entries, weak=True):
            raise DirectionChanged(
                f"If-None-Match is {self.if_none_match}, but {is_now}; leave the condition out to replace it."
            )

    def is_known(self, entries: Sequence[Registered]) -> bool:
        """Whether a GET need not send the directions, because the client already has them."""
        return self.if_none_match is not None and _names(self.if_none_match, entries, weak=True)


def _names(header: str, entries: Sequence[Registered], *, weak: bool) -> bool:
    if not entries:
        return False
    if header.strip() == "*":
        return True
    return any(tag == etag_of(entries) and (weak or not mark) for mark, tag in _ENTITY_TAG.findall(header))
