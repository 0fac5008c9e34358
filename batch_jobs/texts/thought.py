"""Separates the thought of a reasoning model from its answer, by the markers around the thought."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

OPENING: Final = "<think>"
CLOSING: Final = "</think>"
OPEN_THOUGHT: Final = "ended inside its thought"
"""The fault of a text whose thought never closed."""

_MARKER = re.compile(f"({re.escape(OPENING)}|{re.escape(CLOSING)})")


class SplitThought(NamedTuple):
    """A generated text, split into thought and answer."""

    thought: str | None
    """Stripped; None if there is none. Several thoughts are joined by blank lines."""
    answer: str
    """The unchanged text if there is no thought; else the rest, stripped; empty if a thought is open."""
    is_open: bool
    """The text ends inside a thought, so it has no answer."""


def split_thought(text: str, *, opened: bool = False) -> SplitThought:
    """Split generated text into thought and answer.

    A thought is the text between `<think>` and `</think>`. `opened`: the prompt ended in `<think>`, so the text begins
    inside the thought. A `</think>` without a `<think>` before it means the same for a text whose prompt is unknown. A
    text that ends inside a thought has no answer, even if text stands before the thought.
    """
    if not opened and not _MARKER.search(text):
        return SplitThought(None, text, False)
    thoughts: list[str] = []
    answer = ""
    inside = opened
    for piece in _MARKER.split(text):
        if piece == OPENING:
            inside = True
        elif piece == CLOSING:
            if not inside:
                thoughts.append(answer)
                answer = ""
            inside = False
        elif inside:
            thoughts.append(piece)
        else:
            answer += piece
    thought = "\n\n".join(filter(None, map(str.strip, thoughts)))
    return SplitThought(thought, "" if inside else answer.strip(), inside)


def ends_in_thought(text: str) -> bool:
    """Whether `text`, the end of a prompt, opens a thought that it does not close."""
    return text.rfind(OPENING) > text.rfind(CLOSING)
