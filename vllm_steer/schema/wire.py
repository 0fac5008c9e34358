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

The checks in this package need only the object itself. Checks that depend on the engine (the name is registered, the
layer is hooked, α is within the operator's bound) run at admission, in ``vllm_steer.engine.front.admission``.
"""

from __future__ import annotations

import json
from typing import Any

from vllm_steer.errors import MalformedSpec

SCHEMA_VERSION = 2
"""The newest version of the wire format; specs of version 1 mean what they always meant."""
WIRE_KEY = "vllm_steer"
STEERED_HEADER = "x-vllm-steer"
"""Header of HTTP replies to requests that were steered or read; its value is ``REPLY_VERSION``."""
REPLY_VERSION = 1
"""The version of the fields of a reply."""
OPS_OF_V1, SPANS_OF_V1 = ("add", "ablate", "set"), ("prompt", "generated", "all")

Span = str
"""``prompt``, ``generated``, ``response``, ``all``, their slices and sums; see ``vllm_steer.spans``."""


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


_DECODER = json.JSONDecoder(object_pairs_hook=without_duplicates)  # json.loads would make one for each call


def decoded(text: object) -> Any:
    """Decode the JSON text of a spec.

    Raises:
        MalformedSpec: ``text`` is not a string or not JSON, or an object in it repeats a key.
    """
    if not isinstance(text, str):
        raise MalformedSpec(
            f"extra_args[{WIRE_KEY!r}] is {type(text).__name__}; allowed: a JSON string. Use steered(), or json.dumps."
        )
    allowed = "a JSON object with the keys v, steering and readout. Use steered(), or json.dumps"
    return parsed_json(text, f"extra_args[{WIRE_KEY!r}]", allowed)


def parsed_json(text: str | bytes, where: str, allowed: str) -> Any:
    """Parse JSON in which no object repeats a key.

    Args:
        text: the JSON text.
        where: the name of its place, for the message.
        allowed: what the message says is allowed there, and what to do.

    Raises:
        MalformedSpec: it is not JSON, or an object in it repeats a key.
    """
    try:
        return (
            _DECODER.decode(text) if isinstance(text, str) else json.loads(text, object_pairs_hook=without_duplicates)
        )
    except MalformedSpec:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also for more digits than Python accepts
        raise MalformedSpec(f"{where} is not JSON ({error}); allowed: {allowed}.") from None
