"""Adds the plugin's body fields, header, replies and refusals to the server's own ``/openapi.json``."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from vllm_steer.schema.readout import Readout
from vllm_steer.schema.steering import Steering
from vllm_steer.schema.wire import STEERED_HEADER
from vllm_steer.server.inbound.steered_routes import STEERED

_REF = "#/components/schemas/VllmSteer{model}"
Json = dict[str, Any]
DOCUMENT = "/openapi.json"
"""The path of the document."""


def describe(document: Json) -> None:
    """Add what the plugin adds to the routes to the server's OpenAPI document, in place."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(_schemas())
    for path, route in STEERED.items():
        for operation in document.get("paths", {}).get(path, {}).values():
            _describe(operation, schemas, reads=route.reads)


@cache
def _schemas() -> Json:
    """The plugin's schemas, by their names in the document."""
    made: Json = {}
    for kind in (Steering, Readout):
        schema = TypeAdapter(kind).json_schema(ref_template=_REF)
        made |= schema.pop("$defs", {})
        made[kind.__name__] = schema
    for schema in made.values():
        schema["additionalProperties"] = False
        schema["description"] = schema["description"].partition("\n\n")[0].replace("\n", " ")
    # Over HTTP the layers follow from the directions, and so does whether vectors are sent.
    made["Readout"].pop("required", None)
    for name in ("layers", "vectors"):
        made["Readout"]["properties"][name].pop("default", None)
    made["ReadoutReply"] = _READOUT_REPLY
    made["Refusal"] = _REFUSAL
    return {f"VllmSteer{name}": schema for name, schema in made.items()}


def _describe(operation: Json, schemas: Json, *, reads: bool) -> None:
    """Describe the fields of one route."""
    content = operation.get("requestBody", {}).get("content", {})
    for media in content.values():
        reference = media.get("schema", {}).get("$ref", "")
        properties = schemas.get(reference.rpartition("/")[2], {}).get("properties")
        if properties is not None:
            properties["steering"] = {
                "type": "array",
                "items": {"$ref": _REF.format(model="Steering")},
                "description": "Changes of the residual stream; an empty list asks for none of the default.",
            }
            if reads:
                properties["readout"] = {"$ref": _REF.format(model="Readout")}
    parameters = operation.setdefault("parameters", [])
    parameters.append(
        {
            "name": "X-Steering",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "The same as text, direction:alpha[@layer][;field=value ...], or as JSON.",
        }
    )
    responses = operation.setdefault("responses", {})
    whole = responses.setdefault("200", {"description": "Successful Response"})
    whole.setdefault("headers", {})[STEERED_HEADER] = {
        "schema": {"type": "string"},
        "description": "Present if and only if the request was steered or read.",
    }
    if reads:
        whole["description"] += "; readouts as VllmSteerReadoutReply in each choice, or in the reply where it has none"
    refusal = {"application/json": {"schema": {"$ref": _REF.format(model="Refusal")}}}
    for status, told in (("400", "the body is wrong"), ("403", "the direction is not open to this key or alias")):
        if status in responses:  # vLLM's own form is the same
            responses[status]["description"] += f"; also where {told}"
        else:
            responses[status] = {"description": f"Refused: {told}", "content": refusal}


_NUMBERS: Json = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
_PACKED: Json = {
    "type": "object",
    "additionalProperties": {"type": "string", "contentEncoding": "base64"},
    "description": "Layer -> little-endian float32 numbers.",
}
_CROSSING: Json = {
    "type": "object",
    "properties": {
        "direction": {"type": "string"},
        "layer": {"type": "integer"},
        "position": {"type": "integer"},
        "value": {"type": "number"},
    },
}
_READOUT_REPLY: Json = {
    "type": "object",
    "description": "A readout in a reply.",
    "properties": {
        "num_tokens": {"type": "integer"},
        "proof": {"enum": ["parity", "experiment"]},
        "projections": {
            "type": "object",
            "additionalProperties": _NUMBERS,
            "description": "Direction -> layer -> projection of the mean; null where there is none.",
        },
        "mean": _PACKED,
        "last": _PACKED,
        "rows": _PACKED,
        "max": {
            "type": "object",
            "description": "Direction -> layer -> [largest projection of a token, position of that token].",
        },
        "trace": {
            "type": "object",
            "description": 'Direction -> {"start", "values"}: a projection for each token of the span.',
        },
        "held": {"type": "array"},
        "stopped": _CROSSING,
        "flags": {"type": "array", "items": _CROSSING},
        "error": {"type": "string", "description": "Alone: why there is no readout."},
    },
}
_REFUSAL: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "description": "The class in vllm_steer.errors."},
                "param": {"type": ["string", "null"], "description": "The place in the body, such as steering[1]."},
                "code": {"type": "string", "description": "The refusal's name, such as unknown_direction."},
            },
        }
    },
}


def refusals(*statuses: int) -> dict[int | str, Json]:
    """The ``responses`` of one of the plugin's own routes that refuses with these statuses."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Refusal")}}}
    return {status: {"description": "Refused", "content": content} for status in statuses}


ENTRIES: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"steering": {"type": "array", "items": {"$ref": _REF.format(model="Steering")}}},
                    "required": ["steering"],
                }
            }
        },
    }
}
"""``openapi_extra`` of a route that takes entries."""
BINARY: Json = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
"""``openapi_extra`` of a route that takes a file."""
