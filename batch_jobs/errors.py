"""The error that every unusable study input raises."""

from __future__ import annotations

from vllm_steer.errors import SteerError


class StudyError(SteerError):
    """A study's config, texts or run directory cannot be used; the message says where, what was got and what is
    allowed."""
