"""Conditions on a projection: on tokens or the prompt, for steering; on the generated tokens, to stop or flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from vllm_steer.errors import BadCondition
from vllm_steer.messages import shown
from vllm_steer.schema.checks import MOST_FLOAT32, check_name, checked_fields, checked_layer, finite

Over = Literal["token", "prompt"]
OVERS: tuple[str, ...] = get_args(Over)


@dataclass(frozen=True, slots=True)
class When:
    """A condition on each token or on the prompt: an entry with it acts only where the condition holds.

    Over ``token`` it compares ⟨h, d⟩, the projection of the token's own stream onto a registered direction, with a
    bound. At the entry's layer, h is the stream as it is when the entry is reached; at an earlier layer, as that layer
    left it.

    Over ``prompt`` it compares the mean of ⟨h, d⟩ over all prompt tokens, with h as the layer left it: what
    ``Readout(layers=[layer], span="prompt", project=[direction])`` gives. The mean is known when the prompt is done, so
    it may gate only tokens behind it: those of ``generated`` and its slices; and, if it looks at an earlier layer than
    the entry's, the last prompt token too, as in ``response``. Such a request computes its whole prompt itself, and
    takes nothing of it from the prefix cache.

    Both are evaluated on the device, in the same step.

    Args:
        direction: name of the registered direction d, of any length.
        above, below: the bound, exactly one of them: the condition holds where ⟨h, d⟩, or its mean, is > ``above``, or
            < ``below``.
        layer: the layer of h, a hooked one, at most the entry's; ``None`` means the direction's own.
        over: ``token``, each token decides for itself; or ``prompt``, the prompt decides for the tokens behind it.

    Raises:
        MalformedSpec, BadCondition: at construction, naming the offending value.
    """

    direction: str
    above: float | None = None
    below: float | None = None
    layer: int | None = None
    over: Over = "token"

    def __post_init__(self) -> None:
        check_condition(self, "when")
        if self.over not in OVERS:
            raise BadCondition(f"over is {shown(self.over)}; allowed: {', '.join(OVERS)}. Choose one of them.")

    def to_json(self) -> dict[str, Any]:
        """The condition as a JSON object, without fields at their default."""
        told = {"direction": self.direction, "above": self.above, "below": self.below, "layer": self.layer}
        told |= {} if self.over == "token" else {"over": self.over}
        return {name: value for name, value in told.items() if value is not None}

    @classmethod
    def from_json(cls, value: object) -> When:
        """Build a condition from a decoded JSON object.

        Raises:
            UnknownField: it has a field that ``When`` does not have.
            MalformedSpec, BadCondition: as the constructor, or ``direction`` is missing.
        """
        return cls(**checked_fields(cls, value, "when", required=("direction",)))


@dataclass(frozen=True, slots=True)
class Watch:
    """A condition on the generated tokens, for ``Readout.stop`` and ``Readout.flag``.

    It holds once ⟨h, d⟩ of ``patience`` generated tokens in a row is beyond the bound; h is the stream that the layer
    leaves, after its own steering.

    Args:
        direction: name of the registered direction d, of any length.
        above, below: the bound, exactly one of them: a token is beyond it where ⟨h, d⟩ > ``above``, or < ``below``.
        patience: how many tokens in a row, from 1.
        layer: the layer of h, a hooked one; ``None`` means the direction's own.

    Raises:
        MalformedSpec, BadCondition: at construction, naming the offending value.
    """

    direction: str
    above: float | None = None
    below: float | None = None
    patience: int = 1
    layer: int | None = None

    def __post_init__(self) -> None:
        check_condition(self, "the watch")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise BadCondition(f"patience is {shown(self.patience)}; allowed: a whole number from 1. Give one.")

    def to_json(self) -> dict[str, Any]:
        """The watch as a JSON object, without fields at their default."""
        told = {"direction": self.direction, "above": self.above, "below": self.below, "layer": self.layer}
        told["patience"] = None if self.patience == 1 else self.patience
        return {name: value for name, value in told.items() if value is not None}

    @classmethod
    def from_json(cls, value: object, where: str = "stop") -> Watch:
        """Build a watch from a decoded JSON object.

        Raises:
            UnknownField: it has a field that ``Watch`` does not have.
            MalformedSpec, BadCondition: as the constructor, or ``direction`` is missing.
        """
        return cls(**checked_fields(cls, value, where, required=("direction",)))


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where a ``Watch`` held first.

    Attributes:
        direction: its name.
        layer: the layer that was watched.
        position: the position in the request of the token with which the watch held.
        value: ⟨h, d⟩ of that token.
    """

    direction: str
    layer: int
    position: int
    value: float


def bound_of(condition: When | Watch) -> tuple[float, bool]:
    """The bound of a condition, and whether values above it count, and not those below."""
    if condition.above is not None:
        return condition.above, True
    assert condition.below is not None  # one of them is given
    return condition.below, False


def check_condition(condition: When | Watch, where: str) -> None:
    """Check direction, bound and layer of a condition, and store them as plain numbers."""
    check_name(condition.direction, f"the direction of {where}")
    if (condition.above is None) == (condition.below is None):
        raise BadCondition(f"{where} has both or none of above and below; allowed: one of them. Give one.")
    for name in ("above", "below"):
        if (bound := getattr(condition, name)) is not None:
            number = finite(bound, f"{name} of {where}", BadCondition)
            if abs(number) > MOST_FLOAT32:
                raise BadCondition(f"{name} of {where} is {number:g}; allowed: what float32 holds. Use a smaller one.")
            object.__setattr__(condition, name, number)
    if condition.layer is not None:
        object.__setattr__(condition, "layer", checked_layer(condition.layer, f"the layer of {where}"))
