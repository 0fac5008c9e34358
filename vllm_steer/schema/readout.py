"""What is read of a request, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from vllm_steer import spans
from vllm_steer.errors import BadReadout, MalformedSpec
from vllm_steer.messages import json_type, shown
from vllm_steer.schema.checks import check_flag, check_name, checked_fields, checked_layer
from vllm_steer.schema.conditions import Crossing, Watch
from vllm_steer.schema.wire import SPANS_OF_V1, WIRE_KEY, Span

Pool = Literal["mean", "last", "max", "rows"]
Proof = Literal["parity", "experiment"]
"""Why a model's layers are taken to return the residual stream: their classes were compared with Hugging Face
(``parity``), or only the experiment at start-up says so (``experiment``)."""
POOLS: tuple[str, ...] = get_args(Pool)


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
            raise MalformedSpec(
                f"readout layers is {shown(self.layers)}; allowed: a list of layer numbers. Give a list."
            )
        layers = {checked_layer(layer, "a readout layer") for layer in self.layers}
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
        _check_names(project=self.project, trace=self.trace)
        if len(set(self.trace)) < len(self.trace):
            raise BadReadout(f"readout trace is {list(self.trace)}; allowed: each name once. Leave the repeats out.")
        if not isinstance(self.vectors, bool):
            raise MalformedSpec(f"readout vectors is {shown(self.vectors)}; allowed: true or false.")
        if isinstance(self.skip_first, bool) or not isinstance(self.skip_first, int) or self.skip_first < 0:
            raise BadReadout(f"skip_first is {shown(self.skip_first)}; allowed: a whole number from 0.")
        if self.skip_first and self.span not in ("prompt", "all"):
            raise BadReadout(
                f"skip_first came with span {self.span!r}; allowed: 0 there, since it counts prompt tokens. Leave it "
                "out, or move the span's bounds."
            )
        check_flag(self.held, "readout held")
        if not (self.vectors or self.project or self.trace or self.watches or self.held):
            raise BadReadout(
                "vectors is false, project is empty and trace is empty; allowed: at least one of them set. Set one."
            )
        if self.pool not in POOLS:
            raise BadReadout(f"readout pool is {shown(self.pool)}; allowed: {', '.join(POOLS)}. Choose one of them.")
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
        return 1 if self.span in SPANS_OF_V1 and not is_later else 2

    @classmethod
    def from_json(cls, value: object) -> Readout:
        """Build a readout from a decoded JSON object.

        Raises:
            UnknownField: it has a field that ``Readout`` does not have.
            MalformedSpec, BadCondition, BadReadout, BadSpan: as the constructor, or ``layers`` is missing without
                ``stop`` and ``flag``.
        """
        if isinstance(
            value, dict
        ):  # a server fills in layers from names, so wrong names are told before lacking layers
            _check_names(project=value.get("project", ()), trace=value.get("trace", ()))
        is_watch = isinstance(value, dict) and bool(value.get("stop") or value.get("flag"))
        fields = dict(checked_fields(cls, value, "readout", required=() if is_watch else ("layers",)))
        if fields.get("stop") is not None:
            fields["stop"] = Watch.from_json(fields["stop"])
        if "flag" in fields:
            if not isinstance(fields["flag"], list):
                raise MalformedSpec(
                    f"readout flag is a JSON {json_type(fields['flag'])}; allowed: a list of objects. Give a list."
                )
            fields["flag"] = [Watch.from_json(one, "an entry of flag") for one in fields["flag"]]
        return cls(**fields)


def _check_names(**lists: object) -> None:
    """Refuse what is no list of names.

    Raises:
        MalformedSpec: the message names the first such field.
    """
    for where, names in lists.items():
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise MalformedSpec(f"readout {where} is {shown(names)}; allowed: a list of names. Give a list.")
        for name in names:
            check_name(name, f"a name in readout {where}")


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


def stop_reason(direction: str) -> str:
    """The ``stop_reason`` of a sample that ``Readout.stop`` ended, by the name of its direction."""
    return f"{WIRE_KEY}:{direction}"
