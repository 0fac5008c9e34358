"""Limits on text that messages quote from users and libraries."""

from __future__ import annotations

MOST_QUOTED = 200  # characters


def one_line(error: Exception) -> str:
    """An error's message on one line, cut to ``MOST_QUOTED`` characters; a library may quote a whole file."""
    return " ".join(str(error).split())[:MOST_QUOTED]
