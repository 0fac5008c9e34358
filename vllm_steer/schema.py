"""The wire format: the steering and the readout of a request, as typed objects and as JSON.

``SamplingParams.extra_args["vllm_steer"]`` carries one JSON string::

    {"v": 1,
     "steering": [{"direction": "kind", "alpha": 5.0, "layer": 12, "op": "add", "span": "all"}],
     "readout": {"layers": [8, 12], "span": "prompt", "project": ["kind"], "vectors": true, "skip_first": 0,
                 "trace": ["kind"]}}

``v`` is 1 where a request uses only what version 1 has: the spans ``prompt``, ``generated`` and ``all``, the ops
``add``, ``set`` and whole ``ablate``, and none of ``relative``, ``keep_norm``, ``low``, ``high``, ``when``, ``pool``,
``stop``, ``flag`` and ``held``. Otherwise it is 2.
A spec without ``v``, as in HTTP bodies, may use everything.

Without ``steering``, the engine's ``default_steering`` applies, if it has one; ``"steering": []`` turns it off.

The checks here need only the object itself. Checks that depend on the engine (the name is registered, the layer is
hooked, α is within the operator's bound) run at admission, in ``vllm_steer.engine.front.admission``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from vllm_steer import spans
from vllm_steer.errors import BadAlpha, BadCondition, BadOp, BadReadout, MalformedSpec, SpecError, UnknownField

SCHEMA_VERSION = 2
"""The newest version of the wire format; specs of version 1 mean what they always meant."""
WIRE_KEY = "vllm_steer"
STEERED_HEADER = "x-vllm-steer"
"""Header of HTTP replies to requests that were steered or read; its value is ``REPLY_VERSION``."""
REPLY_VERSION = 1
"""The version of the fields of a reply."""

Op = Literal["add", "ablate", "set", "scale", "clamp"]
Span = str
"""``prompt``, ``generated``, ``response``, ``all``, their slices and sums; see ``vllm_steer.spans``."""
Over = Literal["token", "prompt"]
Pool = Literal["mean", "last", "max", "rows"]
Proof = Literal["parity", "experiment"]
"""Why a model's layers are taken to return the residual stream: their classes were compared with Hugging Face
(``parity``), or only the experiment at start-up says so (``experiment``)."""
OPS: tuple[str, ...] = get_args(Op)
OVERS: tuple[str, ...] = get_args(Over)
POOLS: tuple[str, ...] = get_args(Pool)
_OPS_OF_V1, _SPANS_OF_V1 = ("add", "ablate", "set"), ("prompt", "generated", "all")
_RELATIVE_OPS = ("add", "set", "clamp")
MOST_FLOAT32 = float(np.finfo(np.float32).max)


def _layer(layer: object, where: str) -> int:
    if type(layer) is int and layer >= 0:  # the usual case, from JSON
        return layer
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or layer < 0:
        raise MalformedSpec(
            f"{where} is {layer!r}; allowed: a whole number from 0 (the first decoder block). Give the block's index."
        )
    return int(layer)


def _finite(value: object, name: str = "alpha", refusal: type[SpecError] = BadAlpha) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise refusal(f"{name} is {value!r}; allowed: a finite number. Give a number.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise refusal(f"{name} is {number}; allowed: a finite number. Leave the entry out to change nothing.")
    return number


def _check_flag(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise MalformedSpec(f"{name} is {value!r}; allowed: true or false. Give one of them.")


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not name:
        raise MalformedSpec(
            f"{where} is {name!r}; allowed: a non-empty string. Give the name of a registered direction."
        )


def _check_condition(condition: When | Watch, where: str) -> None:
    """Check direction, bound and layer of a condition, and store them as plain numbers."""
    _check_name(condition.direction, f"the direction of {where}")
    if (condition.above is None) == (condition.below is None):
        raise BadCondition(f"{where} has both or none of above and below; allowed: one of them. Give one.")
    for name in ("above", "below"):
        if (bound := getattr(condition, name)) is not None:
            number = _finite(bound, f"{name} of {where}", BadCondition)
            if abs(number) > MOST_FLOAT32:
                raise BadCondition(f"{name} of {where} is {number:g}; allowed: what float32 holds. Use a smaller one.")
            object.__setattr__(condition, name, number)
    if condition.layer is not None:
        object.__setattr__(condition, "layer", _layer(condition.layer, f"the layer of {where}"))


def bound_of(condition: When | Watch) -> tuple[float, bool]:
    """The bound of a condition, and whether values above it count, and not those below."""
    if condition.above is not None:
        return condition.above, True
    assert condition.below is not None  # one of them is given
    return condition.below, False


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
        _check_condition(self, "when")
        if self.over not in OVERS:
            raise BadCondition(f"over is {str(self.over)[:80]!r}; allowed: {', '.join(OVERS)}. Choose one of them.")

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
        return cls(**_checked_fields(cls, value, "when", required=("direction",)))


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
        _check_condition(self, "the watch")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise BadCondition(f"patience is {self.patience!r}; allowed: a whole number from 1. Give one.")

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
        return cls(**_checked_fields(cls, value, where, required=("direction",)))


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
        _check_name(self.direction, "steering direction")
        if self.op not in OPS:
            raise BadOp(f"op is {self.op!r}; allowed: {', '.join(OPS)}. Choose one of them.")
        spans.check(self.span)
        if self.layer is not None and (layer := _layer(self.layer, "steering layer")) is not self.layer:
            object.__setattr__(self, "layer", layer)
        if self.relative is not False or self.keep_norm is not False:
            _check_flag(self.relative, "relative")
            _check_flag(self.keep_norm, "keep_norm")
            if self.relative and self.op not in _RELATIVE_OPS:
                raise BadOp(
                    f"op {self.op!r} came with relative; allowed: relative with {', '.join(_RELATIVE_OPS)}, since "
                    f"{self.op!r} is in units of the projection. Leave relative out."
                )
        if not isinstance(self.when, When | None):
            raise MalformedSpec(f"when is {str(self.when)[:80]!r}; allowed: a condition. Give When(...).")
        if self.when is not None and self.when.over == "prompt" and spans.reach_back(self.span) > 1:
            raise BadCondition(
                f"an entry with span {self.span!r} has a condition over the prompt, whose mean is known when the "
                "prompt is done; allowed: generated, its slices, and (with a condition at an earlier layer) the last "
                "prompt token, as in response. Use one of these spans."
            )
        if self.op == "clamp" or self.low is not None or self.high is not None:
            self._check_bounds()
            return
        if self.alpha is None:
            if self.op != "ablate":
                raise BadAlpha(f"op {self.op!r} came without alpha; allowed: any finite number. Give alpha.")
            object.__setattr__(self, "alpha", 1.0)
            return
        alpha = self.alpha if type(self.alpha) is float and math.isfinite(self.alpha) else _finite(self.alpha)
        if self.op == "ablate" and not 0.0 < alpha <= 2.0:
            raise BadAlpha(
                f"op 'ablate' came with alpha {alpha}; allowed: above 0 (nothing removed) up to 2 (mirrored), 1 to "
                "remove the component. Use op 'set' to choose the projection."
            )
        if alpha is not self.alpha:
            object.__setattr__(self, "alpha", alpha)

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
                object.__setattr__(self, name, _finite(bound, name))
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
        match self.op:
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
        is_new = self.relative or self.keep_norm or self.when is not None or (self.op == "ablate" and self.alpha != 1.0)
        return 1 if self.op in _OPS_OF_V1 and self.span in _SPANS_OF_V1 and not is_new else 2

    def to_json(self) -> dict[str, Any]:
        """The entry as a JSON object: all fields of version 1, and the others where they are not at their default."""
        old = {"direction": self.direction, "alpha": self.alpha, "layer": self.layer, "op": self.op, "span": self.span}
        later: dict[str, Any] = {"relative": self.relative, "keep_norm": self.keep_norm}
        later |= {"low": self.low, "high": self.high, "when": None if self.when is None else self.when.to_json()}
        return old | {name: value for name, value in later.items() if value is not None and value is not False}

    @classmethod
    def from_json(cls, value: object) -> Steering:
        """Build an entry from a decoded JSON object.

        Raises:
            UnknownField: it has a field that ``Steering`` does not have.
            MalformedSpec, BadAlpha, BadOp, BadSpan: as the constructor, or ``direction`` is missing.
        """
        fields = _checked_fields(cls, value, "an entry of steering", required=("direction",))
        if fields.get("when") is not None:
            fields = fields | {"when": When.from_json(fields["when"])}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Readout:
    """The activations to read for one request: the residual stream over a span, pooled, at chosen layers.

    Args:
        layers: hooked layers to read, each after its own steering.
        span: the tokens to read, see ``vllm_steer.spans``: one run of tokens, which ends among the prompt's tokens or
            never. Of the generated tokens it holds those that were fed back into the model, that is all but the last.
        project: names of registered directions to project onto, each at the layers it is registered at.
        vectors: ``False`` transfers only the projections, not the (D,) vectors.
        skip_first: leaves the first k tokens of the prompt out of the mean (the first token is an attention sink with
            a very large norm in many models), as the slice ``prompt[k:]`` or ``all[k:]`` does. Allowed with the spans
            ``prompt`` and ``all``.
        trace: names of registered directions, each once, to follow token by token: ⟨h, d⟩ for every token of the span,
            at the direction's layer, whether or not ``layers`` contains it. A name with several layers is traced at
            the one that ``layers`` contains.
        pool: what becomes of the span's tokens: their ``mean``; the ``last`` one; or ``max``, the largest projection of
            any token onto each name in ``project`` and ``trace``, and where it is. ``max`` gives no vectors, and each
            of its projections takes a trace column as ``trace`` does. ``rows`` pools nothing: the stream of every token
            of the span, as many as the engine's ``max_rows`` allows. It goes without ``project``; ``trace`` projects
            every token.
        stop: ends the request with the generated token with which the watch holds: the sample's ``finish_reason`` is
            ``stop`` and its ``stop_reason`` is ``vllm_steer:`` and the direction's name. That last token has been
            computed, so ``generated``, ``response`` and ``all`` hold it here. Takes a trace column.
        flag: watches that are only reported. Each takes a trace column.
        held: also tell of each entry with a condition on how many of the span's tokens it held, or, of one over the
            prompt, whether it held. Each condition on tokens takes a trace column.

    With ``stop`` or ``flag``, ``layers`` may be empty: then nothing is pooled. If ``trace`` is empty too and ``held``
    false, cached tokens of the prompt are used as for a request without a readout.

    Raises:
        MalformedSpec, BadReadout, BadSpan: at construction, naming the offending value.
    """

    layers: Sequence[int] = ()
    span: Span = "prompt"
    project: Sequence[str] = ()
    vectors: bool = True
    skip_first: int = 0
    trace: Sequence[str] = ()
    pool: Pool = "mean"
    stop: Watch | None = None
    flag: Sequence[Watch] = ()
    held: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise MalformedSpec(f"readout layers is {self.layers!r}; allowed: a list of layer numbers. Give a list.")
        layers = {_layer(layer, "a readout layer") for layer in self.layers}
        if not isinstance(self.stop, Watch | None) or not (
            isinstance(self.flag, Sequence) and all(isinstance(one, Watch) for one in self.flag)
        ):
            raise MalformedSpec("readout stop or flag is of another type; allowed: Watch(...), and a list of them.")
        if not self.layers and not self.watches:
            raise BadReadout("readout layers is empty; allowed: one or more hooked layers. Name the layers to read.")
        if not self.layers and (self.project or self.pool != "mean"):
            raise BadReadout(
                "readout layers is empty and project or pool is set; allowed: stop, flag, trace and held alone. Name "
                "the layers to read."
            )
        if not self.layers:
            object.__setattr__(self, "vectors", False)
        spans.check(self.span)
        for where, names in (("project", self.project), ("trace", self.trace)):
            if isinstance(names, str) or not isinstance(names, Sequence):
                raise MalformedSpec(f"readout {where} is {names!r}; allowed: a list of names. Give a list.")
            for name in names:
                _check_name(name, f"a name in readout {where}")
        if len(set(self.trace)) < len(self.trace):
            raise BadReadout(f"readout trace is {list(self.trace)}; allowed: each name once. Leave the repeats out.")
        if not isinstance(self.vectors, bool):
            raise MalformedSpec(f"readout vectors is {self.vectors!r}; allowed: true or false.")
        if isinstance(self.skip_first, bool) or not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise BadReadout(f"skip_first is {self.skip_first!r}; allowed: a whole number from 0.")
        if self.skip_first and self.span not in ("prompt", "all"):
            raise BadReadout(
                f"skip_first came with span {self.span!r}; allowed: 0 there, since it counts prompt tokens. Leave it "
                "out, or move the span's bounds."
            )
        _check_flag(self.held, "readout held")
        if not (self.vectors or self.project or self.trace or self.watches or self.held):
            raise BadReadout(
                "vectors is false, project is empty and trace is empty; allowed: at least one of them set. Set one."
            )
        if self.pool not in POOLS:
            raise BadReadout(f"readout pool is {self.pool!r}; allowed: {', '.join(POOLS)}. Choose one of them.")
        if self.pool == "max" and not self.project and not self.trace:
            raise BadReadout("pool 'max' came without project and trace; allowed: at least one name in them. Name one.")
        if self.pool == "rows" and (self.project or not self.vectors):
            raise BadReadout(
                f"pool 'rows' came with {'project' if self.project else 'vectors false'}; allowed: rows alone, or "
                "with trace, which projects every token. Use trace instead, or another pool."
            )
        object.__setattr__(self, "layers", tuple(sorted(layers)))
        object.__setattr__(self, "project", tuple(dict.fromkeys(self.project)))
        object.__setattr__(self, "trace", tuple(self.trace))
        object.__setattr__(self, "flag", tuple(self.flag))

    @property
    def watches(self) -> tuple[Watch, ...]:
        """``stop``, if there is one, and those of ``flag``."""
        return (*(() if self.stop is None else (self.stop,)), *self.flag)

    def is_stopped_by(self, reason: object) -> bool:
        """Whether a sample with this ``stop_reason`` was ended by ``stop``."""
        return self.stop is not None and reason == stop_reason(self.stop.direction)

    @property
    def names(self) -> tuple[str, ...]:
        """Every direction that the readout names."""
        return (*self.project, *self.trace, *(one.direction for one in self.watches))

    def to_json(self) -> dict[str, Any]:
        """The readout as a JSON object: all fields of version 1, and the others where they are not at their default."""
        told: dict[str, Any] = {
            "layers": list(self.layers),
            "span": self.span,
            "project": list(self.project),
            "vectors": self.vectors,
            "skip_first": self.skip_first,
            "trace": list(self.trace),
        }
        if self.pool != "mean":
            told["pool"] = self.pool
        if self.stop is not None:
            told["stop"] = self.stop.to_json()
        if self.flag:
            told["flag"] = [one.to_json() for one in self.flag]
        if self.held:
            told["held"] = True
        return told

    @property
    def version(self) -> int:
        """The oldest version of the wire format that has what this readout uses."""
        is_later = self.pool != "mean" or bool(self.watches) or self.held
        return 1 if self.span in _SPANS_OF_V1 and not is_later else 2

    @classmethod
    def from_json(cls, value: object) -> Readout:
        """Build a readout from a decoded JSON object.

        Raises:
            UnknownField: it has a field that ``Readout`` does not have.
            MalformedSpec, BadCondition, BadReadout, BadSpan: as the constructor, or ``layers`` is missing without
                ``stop`` and ``flag``.
        """
        is_watch = isinstance(value, dict) and bool(value.get("stop") or value.get("flag"))
        fields = dict(_checked_fields(cls, value, "readout", required=() if is_watch else ("layers",)))
        if fields.get("stop") is not None:
            fields["stop"] = Watch.from_json(fields["stop"])
        if "flag" in fields:
            if not isinstance(fields["flag"], list):
                raise MalformedSpec(
                    f"readout flag is a JSON {type(fields['flag']).__name__}; allowed: a list of objects. Give a list."
                )
            fields["flag"] = [Watch.from_json(one, "an entry of flag") for one in fields["flag"]]
        return cls(**fields)


@dataclass(frozen=True, slots=True, eq=False)
class ReadoutResult:
    """The readout of one sample.

    Attributes:
        mean: layer -> (D,) float32, the mean residual stream; empty with ``vectors=False`` and with another pool.
        num_tokens: number of tokens in the span. With 0 (no generated token was fed back) what is pooled is NaN.
        projections: direction name -> layer -> ⟨v, direction⟩, at the layers the direction is registered at, where v is
            the pooled vector; empty with the pool ``max``.
        trace: direction name -> (num_tokens,) float32, ⟨h, direction⟩ of each token of the span in order, at the
            direction's own layer and after that layer's steering.
        proof: why the rows are taken to be the residual stream: the model's layers were compared with Hugging Face
            (``parity``), or only the experiment at start-up says so (``experiment``).
        last: layer -> (D,) float32, the stream of the span's last token, with the pool ``last``.
        max: direction name -> layer -> (largest ⟨h, direction⟩ of any token of the span, position of that token in the
            request), with the pool ``max``; (NaN, -1) over no tokens.
        stopped: where ``Readout.stop`` ended the sample; ``None`` if it ended for another reason.
        flags: for each watch of ``Readout.flag`` that held, where it held first, in the order asked for.
        rows: layer -> (num_tokens, D) float32, the stream of each token of the span in order, with the pool ``rows``.
        held: with ``Readout.held``, one for each entry with a condition, in the order of the request's entries: on how
            many of the span's tokens that the entry covers it held; of one over the prompt, whether it held. None for
            an entry that changes nothing, whose condition is not evaluated.
    """

    mean: Mapping[int, npt.NDArray[np.float32]]
    num_tokens: int
    projections: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    trace: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    proof: Proof = "parity"
    last: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    max: Mapping[str, Mapping[int, tuple[float, int]]] = field(default_factory=dict)
    stopped: Crossing | None = None
    flags: tuple[Crossing, ...] = ()
    rows: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    held: tuple[int | bool | None, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """The steering and the readout of one request.

    Attributes:
        steering: the entries. ``None`` if the request does not mention steering, so that the engine's default applies;
            an empty tuple turns the default off.
        readout: ``None`` if the request reads nothing.
    """

    steering: tuple[Steering, ...] | None = None
    readout: Readout | None = None

    @property
    def entries(self) -> tuple[Steering, ...]:
        """``steering``, or an empty tuple for ``None``."""
        return self.steering or ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every direction that the request names, in entries, conditions and the readout; some more than once."""
        read = () if self.readout is None else self.readout.names
        return (*(name for entry in self.entries for name in entry.names), *read)

    @property
    def is_empty(self) -> bool:
        """Whether the request neither steers nor reads."""
        return not self.steering and self.readout is None

    @property
    def version(self) -> int:
        """The oldest version of the wire format that has what this spec uses."""
        return max((1 if self.readout is None else self.readout.version, *(one.version for one in self.entries)))

    def with_default(self, default: tuple[Steering, ...]) -> RequestSpec:
        """The spec with ``default`` as its steering, if it does not mention steering itself."""
        return self if self.steering is not None or not default else replace(self, steering=default)

    def dumps(self) -> str:
        """The JSON string for ``extra_args`` and ``vllm_xargs``."""
        wire: dict[str, Any] = {"v": self.version}
        if self.steering is not None:
            wire["steering"] = [entry.to_json() for entry in self.steering]
        if self.readout is not None:
            wire["readout"] = self.readout.to_json()
        return json.dumps(wire, separators=(",", ":"))

    @classmethod
    def loads(cls, text: object) -> RequestSpec:
        """Parse the JSON string that ``dumps`` makes.

        Raises:
            MalformedSpec: not a string, not JSON, or of the wrong shape or version.
            UnknownField: it has a field that the wire format does not have.
            BadAlpha, BadOp, BadSpan, BadReadout: as ``Steering`` and ``Readout``.
        """
        return _spec_of(text) if isinstance(text, str) else cls.from_json(decoded(text))

    @classmethod
    def from_json(cls, wire: object) -> RequestSpec:
        """Build a spec from a decoded JSON object; raises as ``loads``."""
        if not isinstance(wire, dict):
            raise MalformedSpec(f"the steering spec is a JSON {type(wire).__name__}; allowed: an object.")
        unknown = sorted(set(wire) - {"v", "steering", "readout"})
        if unknown:
            raise UnknownField(f"the steering spec has {unknown}; allowed: v, steering, readout. Remove the others.")
        version = wire.get("v", SCHEMA_VERSION)
        if isinstance(version, bool) or version not in range(1, SCHEMA_VERSION + 1):
            raise MalformedSpec(
                f"the steering spec has version {version!r}; allowed: 1 to {SCHEMA_VERSION}. Use a client of one of "
                "these."
            )
        steering = wire.get("steering")
        if not isinstance(steering, list | None):
            raise MalformedSpec(f"steering is a JSON {type(steering).__name__}; allowed: a list of entries.")
        readout = wire.get("readout")
        spec = cls(
            steering=None if steering is None else tuple(Steering.from_json(entry) for entry in steering),
            readout=None if readout is None else Readout.from_json(readout),
        )
        if version < spec.version:
            raise MalformedSpec(
                f"the steering spec has version {version} and uses what version {spec.version} has; allowed there: the "
                f"spans {', '.join(_SPANS_OF_V1)} and the ops {', '.join(_OPS_OF_V1)}, without later fields. Say "
                f"version {spec.version}."
            )
        return spec


@lru_cache(maxsize=32)
def _spec_of(text: str) -> RequestSpec:
    """Cached, because consecutive requests often have the same spec: texts of an extraction, rows of a condition."""
    return RequestSpec.from_json(decoded(text))


def stop_reason(direction: str) -> str:
    """The ``stop_reason`` of a sample that ``Readout.stop`` ended, by the name of its direction."""
    return f"{WIRE_KEY}:{direction}"


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for ``json.loads`` that refuses repeated keys; Python alone keeps the last value.

    Raises:
        MalformedSpec: a key is repeated.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedSpec(f"{twice[:80]!r} appears twice in one JSON object; allowed: once. Leave one out.")
    return made


def decoded(text: object) -> Any:
    """Decode the JSON text of a spec.

    Raises:
        MalformedSpec: ``text`` is not a string or not JSON, or an object in it repeats a key.
    """
    if not isinstance(text, str):
        raise MalformedSpec(
            f"extra_args[{WIRE_KEY!r}] is {type(text).__name__}; allowed: a JSON string. Use steered(), or json.dumps."
        )
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except MalformedSpec:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also for more digits than Python accepts
        raise MalformedSpec(
            f"extra_args[{WIRE_KEY!r}] is not JSON ({error}); allowed: a JSON object with the keys v, steering and "
            "readout. Use steered(), or json.dumps."
        ) from None


def _checked_fields(cls: type[Any], value: object, where: str, required: Sequence[str]) -> dict[str, Any]:
    allowed = cls.__match_args__  # the names of a dataclass's fields
    if not isinstance(value, dict):
        raise MalformedSpec(f"{where} is a JSON {type(value).__name__}; allowed: an object with {', '.join(allowed)}.")
    unknown = [name for name in value if name not in allowed]
    if unknown:
        raise UnknownField(f"{where} has the field {min(unknown)!r}; allowed: {', '.join(allowed)}. Remove it.")
    missing = [name for name in required if name not in value]
    if missing:
        raise MalformedSpec(f"{where} lacks {missing[0]!r}; allowed fields: {', '.join(allowed)}. Add it.")
    return value
