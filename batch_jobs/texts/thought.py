"""What a model that reasons writes before its answer, told apart from the answer by its markers."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

OPENING: Final = "<think>"
CLOSING: Final = "</think>"
OPEN_THOUGHT: Final = "ended inside its thought"
"""What is wrong with a text whose thought never closed."""

_MARKER = re.compile(f"({re.escape(OPENING)}|{re.escape(CLOSING)})")


class SplitThought(NamedTuple):
    """A generated text in its two parts."""

    thought: str | None
    """Stripped; None where there is none. Several thoughts stand a blank line apart."""
    answer: str
    """The text itself, unchanged, where there is no thought; else the rest, stripped, and empty while a thought is
    open."""
    is_open: bool
    """The text ends inside a thought, so the answer was never begun."""


def split_thought(text: str, *, opened: bool = False) -> SplitThought:
    """Split what a model generated into thought and answer.

    A thought is what stands between `<think>` and `</think>`. `opened`: the prompt ended in `<think>`, so the text
    begins inside the thought. A `</think>` without a `<think>` before it says the same of a text whose prompt is not
    known. A text that ends inside a thought has no answer, whatever stands before the thought.
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
    """Whether `text`, the end of a prompt, has opened a thought that it does not close."""
    return text.rfind(OPENING) > text.rfind(CLOSING)
