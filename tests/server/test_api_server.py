"""The plugin in vLLM's own OpenAI-compatible server, a process of its own: steering by what stock vLLM lets through."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.engine.tiny_models import HIDDEN_SIZE, save_tiny_model
from vllm_steer import Direction, save_directions

pytestmark = [pytest.mark.slow, pytest.mark.server]

START_SECONDS = 300.0
KIND_LAYER = 2


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server with one direction, "kind", at a hooked layer."""
    folder = tmp_path_factory.mktemp("server")
    model = save_tiny_model("llama", demo_model, folder / "model")
    vector = np.random.default_rng(0).standard_normal(HIDDEN_SIZE)
    save_directions(folder / "dirs.safetensors", [Direction("kind", KIND_LAYER, vector).normalised()])
    settings = {"vllm_steer": {"layers": [1, KIND_LAYER], "directions": [str(folder / "dirs.safetensors")]}}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--api-key", "secret",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20),
        "--additional-config", json.dumps(settings),
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as output:
        environment = {**os.environ, "VLLM_PLUGINS": "vllm_steer"}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer secret"}, timeout=60
        ) as client:
            deadline = time.monotonic() + START_SECONDS
            while not _is_healthy(client):
                assert process.poll() is None, log.read_text(errors="replace")[-4000:]
                assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def _complete(client: httpx.Client, spec: object | None) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Once upon a time there was", "max_tokens": 16, "temperature": 0}
    if spec is not None:
        body["vllm_xargs"] = {"vllm_steer": spec if isinstance(spec, str) else json.dumps(spec)}
    return client.post("/v1/completions", json=body)


def test_the_route_lists_layers_limits_and_directions(server: httpx.Client) -> None:
    shown = server.get("/v1/steering").json()
    assert shown["layers"] == [1, KIND_LAYER]
    assert [(one["name"], one["layer"]) for one in shown["directions"]] == [("kind", KIND_LAYER)]


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
    ("spec", "status", "told"),
    [
        ("{not json", 400, "not JSON"),
        ({"steering": [{"direction": "unknown", "alpha": 1.0}]}, 404, "no direction is named 'unknown'"),
        ({"steering": [{"direction": "kind", "alpha": 1.0, "layer": 0}]}, 404, "layer 0 is not hooked"),
        ({"steering": [{"direction": "kind", "alpha": 1e9}]}, 400, "alpha is 1e+09"),
        ({"steering": [{"direction": "kind", "alpha": 1.0}] * 9}, 413, "9 entries at layer 2"),
    ],
)
def test_a_bad_spec_is_a_client_error_and_the_server_goes_on(
    server: httpx.Client, spec: object, status: int, told: str
) -> None:
    refused = _complete(server, spec)
    assert refused.status_code == status, refused.text
    assert told in refused.json()["error"]["message"]
    assert _complete(server, None).status_code == 200
