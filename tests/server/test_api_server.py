"""The plugin in vLLM's own OpenAI-compatible server, in a separate process: steering by fields that vLLM passes on."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.server.conftest import KIND_LAYER, OTHER_LAYER

pytestmark = [pytest.mark.slow, pytest.mark.server]


def _complete(client: httpx.Client, spec: object | None) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Once upon a time there was", "max_tokens": 16, "temperature": 0}
    if spec is not None:
        body["vllm_xargs"] = {"vllm_steer": spec if isinstance(spec, str) else json.dumps(spec)}
    return client.post("/v1/completions", json=body)


def test_the_route_lists_layers_limits_and_directions(server: httpx.Client) -> None:
    shown = server.get("/v1/steering").json()
    assert shown["layers"] == [OTHER_LAYER, KIND_LAYER]
    assert {("kind", KIND_LAYER), ("other", OTHER_LAYER)} <= {
        (one["name"], one["layer"]) for one in shown["directions"]
    }


def test_the_route_is_guarded_by_the_api_key(server: httpx.Client) -> None:
    assert httpx.get(f"{server.base_url}/v1/steering").status_code == 401


def test_a_request_is_steered_through_vllm_xargs_and_the_next_one_is_not(server: httpx.Client) -> None:
    plain = _complete(server, None).json()["choices"][0]["text"]
    strong = {"v": 1, "steering": [{"direction": "kind", "alpha": 50.0}]}
    steered = _complete(server, strong).json()["choices"][0]["text"]
    assert steered != plain
    assert _complete(server, None).json()["choices"][0]["text"] == plain
    assert _complete(server, strong).json()["choices"][0]["text"] == steered


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{not json", "not JSON"),
        ({"steering": [{"direction": "unknown", "alpha": 1.0}]}, "no direction is named 'unknown'"),
        ({"steering": [{"direction": "kind", "alpha": 1.0, "layer": 0}]}, "layer 0 is not hooked"),
        ({"steering": [{"direction": "kind", "alpha": 1e9}]}, "alpha is 1e+09"),
        ({"steering": [{"direction": "kind", "alpha": 1.0}] * 9}, "9 entries at layer 2"),
    ],
)
def test_a_bad_spec_is_a_client_error_and_the_server_goes_on(server: httpx.Client, spec: object, told: str) -> None:
    refused = _complete(server, spec)
    assert refused.status_code == 400, refused.text
    assert told in refused.json()["error"]["message"]
    assert _complete(server, None).status_code == 200
