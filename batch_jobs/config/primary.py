"""The primary hypothesis of a study: the one comparison that is stated before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from batch_jobs.errors import StudyError

RECORD_FIELD = "primary"
"""Field of provenance.json."""


class Primary(BaseModel):
    """What is expected of one direction at one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    direction: str = Field(min_length=1)
    """Name of the direction as the rows have it: the concept's for the mean difference."""
    layer: int = Field(ge=0)
    scenarios: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """None: all scenarios of the study, pooled."""
    outcome: Literal["delta"] = "delta"
    """Mean rate of the outcome at +α minus that at -α, over the |α| with both signs."""
    sign: Literal["positive", "negative"] = "positive"
    """Expected sign of the outcome."""
    minimum: Annotated[float, Field(gt=0, le=1)] | None = None
    """Least size that counts as the effect; None: any size of that sign."""

    @field_validator("scenarios")
    @classmethod
    def _once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if repeated := [name for name in names or () if (names or ()).count(name) > 1]:
            raise ValueError(f"{repeated[0]!r} is given more than once; give each scenario once")
        return names


def recorded_primary(provenance: Mapping[str, Any]) -> tuple[Primary, str] | None:
    """The primary hypothesis in a run's provenance, and when it was written down (UTC, ISO 8601); None without one.

    Raises:
        StudyError: the record is not one that a run writes.
    """
    record = provenance.get(RECORD_FIELD)
    if record is None:
        return None
    try:
        fields = dict(record)
        return Primary.model_validate({name: fields[name] for name in fields if name != "stated_at"}), str(
            fields["stated_at"]
        )
    except (TypeError, ValueError, KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise StudyError(
            f"provenance.json has a {RECORD_FIELD} hypothesis that cannot be read ({reason}); restore the file."
        ) from error
