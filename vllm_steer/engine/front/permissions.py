"""The directions that a caller may name: ``allowed_directions`` of the settings, by API key and by alias."""

from __future__ import annotations

from hashlib import sha256

from vllm_steer.errors import DirectionNotAllowed
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.settings import SteerSettings

_KEY_DIGITS = 12


def allowed_for(settings: SteerSettings, key: str | None, alias: str | None = None) -> frozenset[str] | None:
    """The directions that a caller with this API key may name in requests to this alias; None means any.

    The entries of an alias or of the default steering are the operator's own and need no permission.
    """
    callers = [] if alias is None else [alias]
    if key is not None:
        callers.append(f"key:{sha256(key.encode()).hexdigest()[:_KEY_DIGITS]}")
    lists = [frozenset(settings.allowed_directions[who]) for who in callers if who in settings.allowed_directions]
    return frozenset.intersection(*lists) if lists else None


def check_allowed(spec: RequestSpec, allowed: frozenset[str] | None) -> None:
    """Refuse a spec that steers with or reads a direction outside ``allowed``; None allows any.

    Raises:
        DirectionNotAllowed: the spec names another direction.
    """
    if allowed is None:
        return
    for name in spec.names:
        if name not in allowed:
            raise DirectionNotAllowed(
                f"direction {name!r} is not open to this API key or alias; allowed: "
                f"{', '.join(sorted(allowed)) or 'none'}. Name one of these, or ask the server's operator."
            )
