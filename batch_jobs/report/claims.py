"""Claims of the original study that its authors' public data contradict, stored in `data/published_claims.json`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from pydantic import BaseModel, ConfigDict, TypeAdapter


class PublishedClaim(BaseModel):
    """One claim of the paper beside what the public data give."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    claim: str
    where: str
    """Places in the paper."""
    data: str
    """What the public data give."""
    reproduce: str
    """File or command, and the columns to look at."""


@cache
def read_claims() -> tuple[PublishedClaim, ...]:
    """Read the claims from the package."""
    content = (files("batch_jobs") / "data" / "published_claims.json").read_bytes()
    return TypeAdapter(tuple[PublishedClaim, ...]).validate_json(content)
