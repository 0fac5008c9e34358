"""The error that every unusable study input ends in."""

from __future__ import annotations

from vllm_steer.errors import SteerError


class StudyError(SteerError):
    """A study's config, texts or run directory cannot be used; the message names the place, what was got,
    what is allowed."""
