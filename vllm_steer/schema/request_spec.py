"""The steering and the readout of one request."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from vllm_steer.errors import MalformedSpec, SteerError, UnknownField
from vllm_steer.messages import json_type, shown
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.steering import Steering
from vllm_steer.schema.wire import OPS_OF_V1, SCHEMA_VERSION, SPANS_OF_V1, decoded

Parsed = TypeVar("Parsed")


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
        of_readout = 1 if self.readout is None else self.readout.version
        return max([of_readout, *[one.version for one in self.entries]])

    def with_default(self, default: tuple[Steering, ...]) -> RequestSpec:
        """The spec with ``default`` as its steering, if it does not mention steering itself."""
        return self if self.steering is not None or not default else replace(self, steering=default)

    def dumps(self) -> str:
        """The JSON string for ``extra_args`` and ``vllm_xargs``."""
        version, parts = 1 if self.readout is None else self.readout.version, []
        if self.steering is not None:
            told = [entry.dumps() for entry in self.steering]
            version = max(version, *[own for _, own in told]) if told else version
            parts.append(f'"steering":[{",".join([text for text, _ in told])}]')
        if self.readout is not None:
            parts.append(f'"readout":{json.dumps(self.readout.to_json(), separators=(",", ":"))}')
        return "{" + ",".join([f'"v":{version}', *parts]) + "}"

    @classmethod
    def loads(cls, text: object) -> RequestSpec:
        """Parse the JSON string that ``dumps`` makes.

        Raises:
            MalformedSpec: not a string, not JSON, or of the wrong shape or version.
            UnknownField: it has a field that the wire format does not have.
            BadAlpha, BadOp, BadSpan, BadReadout: as ``Steering`` and ``Readout``.
        """
        if isinstance(text, str) and len(text) <= _LONGEST_REMEMBERED:
            return _spec_of(text)
        return cls.from_json(decoded(text))

    @classmethod
    def from_json(cls, wire: object) -> RequestSpec:
        """Build a spec from a decoded JSON object; raises as ``loads``."""
        if not isinstance(wire, dict):
            raise MalformedSpec(f"the steering spec is a JSON {json_type(wire)}; allowed: an object.")
        unknown = [name for name in wire if name not in ("v", "steering", "readout")]
        if unknown:
            raise UnknownField(
                f"the steering spec has {sorted(unknown)}; allowed: v, steering, readout. Remove the others."
            )
        version = wire.get("v", SCHEMA_VERSION)
        if isinstance(version, bool) or version not in range(1, SCHEMA_VERSION + 1):
            raise MalformedSpec(
                f"the steering spec has version {shown(version)}; allowed: 1 to {SCHEMA_VERSION}. Use a client of "
                "one of these."
            )
        steering = wire.get("steering")
        if not isinstance(steering, list | None):
            raise MalformedSpec(f"steering is a JSON {json_type(steering)}; allowed: a list of entries.")
        readout = wire.get("readout")
        spec = cls(
            steering=None
            if steering is None
            else tuple([_at(f"steering[{place}]", Steering.from_json, entry) for place, entry in enumerate(steering)]),
            readout=None if readout is None else _at("readout", Readout.from_json, readout),
        )
        if version < SCHEMA_VERSION and version < spec.version:
            raise MalformedSpec(
                f"the steering spec has version {version} and uses what version {spec.version} has; allowed there: the "
                f"spans {', '.join(SPANS_OF_V1)} and the ops {', '.join(OPS_OF_V1)}, without later fields. Say "
                f"version {spec.version}."
            )
        return spec


def _at(place: str, parse: Callable[[object], Parsed], value: object) -> Parsed:
    """``parse(value)``; a refusal names the place."""
    try:
        return parse(value)
    except SteerError as error:
        error.param = place
        raise


_LONGEST_REMEMBERED = 1024  # characters; longer texts are rare, and would make the cache large


@lru_cache(maxsize=16_384)
def _spec_of(text: str) -> RequestSpec:
    """Cached, because requests often have the same spec: texts of an extraction, rows of a grid's conditions."""
    return RequestSpec.from_json(decoded(text))
