"""The server's description of itself: the fields, header and refusals of the plugin, as they are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import httpx
import jsonschema
import pytest

from tests.server.conftest import ALIAS_ALPHA
from vllm_steer import Readout, Steering
from vllm_steer.server.inbound.steered_routes import STEERED

pytestmark = [pytest.mark.slow, pytest.mark.server]

BODY = {
    "model": "tiny",
    "prompt": "Once",
    "max_tokens": 3,
    "steering": [
        {"direction": "kind", "alpha": ALIAS_ALPHA, "when": {"direction": "kind", "above": 0.0}},
        {"direction": "kind", "op": "clamp", "low": -1.0},
    ],
    "readout": {"project": ["kind"], "trace": ["kind"], "span": "all", "flag": [{"direction": "kind", "above": -1e9}]},
}


@pytest.fixture(scope="module")
def document(server: httpx.Client) -> dict[str, Any]:
    return dict(server.get("/openapi.json").json())


def checked(document: dict[str, Any], name: str, value: object) -> None:
    """Raise unless ``value`` fits the schema of this name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)


def test_every_steered_route_describes_its_fields_header_and_refusals(document: dict[str, Any]) -> None:
    schemas, described = document["components"]["schemas"], 0
    for path, route in STEERED.items():
        for operation in document["paths"].get(path, {}).values():
            described += 1
            assert "X-Steering" in [one["name"] for one in operation["parameters"]]
            assert "x-vllm-steer" in operation["responses"]["200"]["headers"]
            assert {"400", "403"} <= set(operation["responses"])
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in schema:
                properties = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
                assert ("steering" in properties, "readout" in properties) == (True, route.reads), path
    assert described >= 8


def test_the_schemas_have_the_fields_of_the_classes_and_fit_what_is_sent(
    document: dict[str, Any], server: httpx.Client
) -> None:
    schemas = document["components"]["schemas"]
    for kind in (Steering, Readout):
        assert set(schemas[f"VllmSteer{kind.__name__}"]["properties"]) == {one.name for one in fields(kind)}
    for entry in BODY["steering"]:
        checked(document, "VllmSteerSteering", entry)
    checked(document, "VllmSteerReadout", BODY["readout"])
    for wrong in ({"direction": "kind", "alfa": 1}, {"direction": "kind", "alpha": "1"}, {"alpha": 1}):
        with pytest.raises(jsonschema.ValidationError):
            checked(document, "VllmSteerSteering", wrong)
    reply = server.post("/v1/completions", json=BODY)
    assert reply.status_code == 200, reply.text
    readout = reply.json()["choices"][0]["readout"]
    checked(document, "VllmSteerReadoutReply", readout)
    assert set(readout) <= set(schemas["VllmSteerReadoutReply"]["properties"])
    assert {"flags", "trace", "projections"} <= set(readout)
    refused = server.post("/v1/completions", json={**BODY, "steering": [{"direction": "nobody", "alpha": 1}]})
    checked(document, "VllmSteerRefusal", refused.json())
    assert set(refused.json()["error"]) == set(schemas["VllmSteerRefusal"]["properties"]["error"]["properties"])


def test_the_plugins_own_routes_tell_their_refusals(document: dict[str, Any], server: httpx.Client) -> None:
    put = document["paths"]["/v1/steering/directions/{name}"]["put"]
    assert "application/octet-stream" in put["requestBody"]["content"]
    for method, path in (("DELETE", "directions"), ("DELETE", "aliases"), ("GET", "readouts"), ("GET", "directions")):
        reply = server.request(method, f"/v1/steering/{path}/nobody", headers={"X-Admin-Key": "admin-secret"})
        (told,) = (one for one in document["paths"] if one.startswith(f"/v1/steering/{path}/{{"))
        assert str(reply.status_code) in document["paths"][told][method.lower()]["responses"]
