"""How much of a user's text or of a library's error stands in a message."""

from __future__ import annotations

MOST_QUOTED = 200  # characters


def one_line(error: Exception) -> str:
    """The message of a library's error, shortened to one line: it may quote a whole file."""
    return " ".join(str(error).split())[:MOST_QUOTED]
