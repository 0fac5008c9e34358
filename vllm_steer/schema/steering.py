"""One change of the residual stream after one decoder layer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, Literal, get_args

from vllm_steer import spans
from vllm_steer.errors import BadAlpha, BadCondition, BadOp, MalformedSpec
from vllm_steer.messages import shown
from vllm_steer.schema.checks import check_flag, check_name, checked_fields, checked_layer, finite
from vllm_steer.schema.conditions import When
from vllm_steer.schema.wire import OPS_OF_V1, SPANS_OF_V1, Span

Op = Literal["add", "ablate", "set", "scale", "clamp"]
OPS: tuple[str, ...] = get_args(Op)
_RELATIVE_OPS = ("add", "set", "clamp")


@dataclass(frozen=True, slots=True)
class Steering:
    """One change of the residual stream h after one decoder layer, for one request.

    ========  =============================  ====================================================
    ``op``    result                         alpha
    ========  =============================  ====================================================
    add       h + α·d                        any finite number (the paper's equation 2)
    ablate    h − α·⟨h,d⟩·d                  0 < α ≤ 2: 1, as if left out, removes the component
                                             along d, 2 mirrors it
    set       h + (α − ⟨h,d⟩)·d              the projection that h has afterwards
    scale     h + (α − 1)·⟨h,d⟩·d            the factor of the projection
    clamp     the projection is moved to     none; ``low``, ``high`` or both
              the nearest value from
              ``low`` to ``high``
    ========  =============================  ====================================================

    Args:
        direction: name of a registered direction d, shape (D,); of length 1 for every op but ``add``.
        alpha: the multiplier α; required for ``add``, ``set`` and ``scale``.
        layer: 0-based decoder block whose output is changed; ``None`` means the direction's own layer.
        op: see the table.
        span: the tokens to change, see ``vllm_steer.spans``. Each token's own position decides. ``generated`` leaves
            the first generated token as it is, since that comes from the last prompt token; ``response`` steers both.
        relative: measures α, ``low`` and ``high`` in lengths ‖h‖ of each token's own stream, as it is when this entry
            is reached. For ``add``, ``set`` and ``clamp``; the other ops are relative anyway.
        keep_norm: afterwards gives h the length that it had before this entry.
        low, high: the bounds of ``clamp``; ``None`` for none.
        when: the condition under which the entry acts on tokens of the span; ``None`` to act on all of them.

    Several entries at one layer are applied in the order given.

    Raises:
        MalformedSpec, BadAlpha, BadOp, BadSpan: at construction, naming the offending value.
    """

    direction: str
    alpha: float | None = None
    layer: int | None = None
    op: Op = "add"
    span: Span = "all"
    relative: bool = False
    keep_norm: bool = False
    low: float | None = None
    high: float | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        check_name(self.direction, "steering direction")
        if self.op not in OPS:
            raise BadOp(f"op is {shown(self.op)}; allowed: {', '.join(OPS)}. Choose one of them.")
        spans.check(self.span)
        if self.layer is not None and (layer := checked_layer(self.layer, "steering layer")) is not self.layer:
            object.__setattr__(self, "layer", layer)
        if self.relative is not False or self.keep_norm is not False:
            check_flag(self.relative, "relative")
            check_flag(self.keep_norm, "keep_norm")
            if self.relative and self.op not in _RELATIVE_OPS:
                raise BadOp(
                    f"op {self.op!r} came with relative; allowed: relative with {', '.join(_RELATIVE_OPS)}, since "
                    f"{self.op!r} is in units of the projection. Leave relative out."
                )
        if self.when is not None:
            self._check_when()
        if self.op == "clamp" or self.low is not None or self.high is not None:
            self._check_bounds()
            return
        if self.alpha is None:
            if self.op != "ablate":
                raise BadAlpha(f"op {self.op!r} came without alpha; allowed: any finite number. Give alpha.")
            object.__setattr__(self, "alpha", 1.0)
            return
        alpha = self.alpha if type(self.alpha) is float and math.isfinite(self.alpha) else finite(self.alpha)
        if self.op == "ablate" and not 0.0 < alpha <= 2.0:
            raise BadAlpha(
                f"op 'ablate' came with alpha {alpha}; allowed: above 0 (nothing removed) up to 2 (mirrored), 1 to "
                "remove the component. Use op 'set' to choose the projection."
            )
        if alpha is not self.alpha:
            object.__setattr__(self, "alpha", alpha)

    def _check_when(self) -> None:
        if not isinstance(self.when, When):
            raise MalformedSpec(f"when is {shown(self.when)}; allowed: a condition. Give When(...).")
        if self.when.over == "prompt" and spans.reach_back(self.span) > 1:
            raise BadCondition(
                f"an entry with span {self.span!r} has a condition over the prompt, whose mean is known when the "
                "prompt is done; allowed: generated, its slices, and (with a condition at an earlier layer) the last "
                "prompt token, as in response. Use one of these spans."
            )

    def _check_bounds(self) -> None:
        """Check the bounds of ``clamp``, and that nothing else comes with bounds."""
        if self.op != "clamp":
            raise BadOp(f"op {self.op!r} came with low or high; allowed: with op 'clamp'. Leave them out.")
        if self.alpha is not None:
            raise BadAlpha(f"op 'clamp' came with alpha {self.alpha!r}; allowed: low and high instead. Leave it out.")
        if self.low is None and self.high is None:
            raise BadAlpha("op 'clamp' came without bounds; allowed: low, high or both. Give one.")
        for name in ("low", "high"):
            if (bound := getattr(self, name)) is not None:
                object.__setattr__(self, name, finite(bound, name))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise BadAlpha(f"low is {self.low:g} and high is {self.high:g}; allowed: low up to high. Swap them.")

    @property
    def names(self) -> tuple[str, ...]:
        """The direction, and that of the condition."""
        return (self.direction,) if self.when is None else (self.direction, self.when.direction)

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b) of ``plan.entry_rows.Entry``: h + (a + b·⟨h,d⟩)·d, or the bounds of ``clamp``."""
        if self.op == "clamp":
            return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        assert self.alpha is not None  # set by __post_init__
        match self.op:  # the most frequent op first
            case "add":
                return self.alpha, 0.0
            case "set":
                return self.alpha, -1.0
            case "ablate":
                return 0.0, -self.alpha
        return 0.0, self.alpha - 1.0

    @property
    def multiplier(self) -> float:
        """The size that bounds on α look at: |α|; |α − 1| for ``scale``, the larger bound for ``clamp``, 0 for
        ``ablate``, which never makes the projection larger."""
        if self.op == "add" and self.alpha is not None:
            return abs(self.alpha)
        if self.op == "clamp":
            return max(abs(bound) for bound in (self.low, self.high) if bound is not None)
        a, b = self.coefficients
        return abs(b) if self.op == "scale" else abs(a)

    @property
    def is_multiple(self) -> bool:
        """Whether ``multiplier`` counts lengths of the stream, not units of its own."""
        return self.relative or self.op == "scale"

    @property
    def version(self) -> int:
        """The oldest version of the wire format that has what this entry uses."""
        return self._version if self._is_old else 2

    @property
    def _version(self) -> int:
        """``version`` of an entry without later fields."""
        is_new = self.op not in OPS_OF_V1 or self.span not in SPANS_OF_V1 or (self.op == "ablate" and self.alpha != 1.0)
        return 2 if is_new else 1

    @property
    def _is_old(self) -> bool:
        """Whether no field that version 1 lacks is set."""
        return self.when is None and self.low is None and self.high is None and not self.relative and not self.keep_norm

    def to_json(self) -> dict[str, Any]:
        """The entry as a JSON object: all fields of version 1, and the others where they are not at their default."""
        old = {"direction": self.direction, "alpha": self.alpha, "layer": self.layer, "op": self.op, "span": self.span}
        if self._is_old:
            return old
        later: dict[str, Any] = {"relative": self.relative, "keep_norm": self.keep_norm}
        later |= {"low": self.low, "high": self.high, "when": None if self.when is None else self.when.to_json()}
        return old | {name: value for name, value in later.items() if value is not None and value is not False}

    def dumps(self) -> tuple[str, int]:
        """``to_json`` as JSON text without spaces, and ``version``."""
        if not self._is_old:
            return json.dumps(self.to_json(), separators=(",", ":")), 2
        layer = "null" if self.layer is None else self.layer
        named, span = _quoted(self.direction), _quoted(self.span)
        text = f'{{"direction":{named},"alpha":{self.alpha!r},"layer":{layer},"op":"{self.op}","span":{span}}}'
        return text, self._version

    @classmethod
    def from_json(cls, value: object) -> Steering:
        """Build an entry from a decoded JSON object.

        Raises:
            UnknownField: it has a field that ``Steering`` does not have.
            MalformedSpec, BadAlpha, BadOp, BadSpan: as the constructor, or ``direction`` is missing.
        """
        fields = checked_fields(cls, value, "an entry of steering", required=("direction",))
        if fields.get("when") is not None:
            fields = fields | {"when": When.from_json(fields["when"])}
        return cls(**fields)
