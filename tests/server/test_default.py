"""A server's default steering acts on every route that generates, unless a request says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import ALIAS, API_KEY, KIND_LAYER, OTHER_LAYER, running_server, save_two_directions
from tests.support.server.asking import READ, READING, ROUTES, USES, events_of, post, readout_of, said
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.server]

DEFAULT = [{"direction": "kind", "alpha": 50.0}]
ALIASED = [{"direction": "other", "alpha": 60.0}]


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("default")
    model = save_tiny_model("llama", demo_model, folder / "model")
    save_two_directions(folder / "dirs.safetensors")
    settings = {
        "layers": [OTHER_LAYER, KIND_LAYER],
        "directions": [str(folder / "dirs.safetensors")],
        "default_steering": DEFAULT,
        "served_aliases": {ALIAS: ALIASED},
    }
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--enable-scale-out",
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
    )
    switches = {"VLLM_PLUGINS": "vllm_steer", "VLLM_ENABLE_COHERE_API": "1"}
    with (
        running_server(command, folder / "server.log", **switches) as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client,
    ):
        yield client


@ROUTES
def test_the_default_acts_and_is_marked_and_switched_off(server: httpx.Client, path: str) -> None:
    by_default, plain = post(server, path), post(server, path, steering=[])
    assert said(path, by_default) != said(path, plain)
    assert said(path, by_default) == said(path, post(server, path, steering=DEFAULT))
    assert ("x-vllm-steer" in by_default.headers, "x-vllm-steer" in plain.headers) == (True, False)
    # The steering of a request or of its alias replaces the default.
    assert said(path, post(server, path, model=ALIAS)) == said(path, post(server, path, steering=ALIASED))


@READING
def test_a_readout_leaves_the_default_as_it_is(server: httpx.Client, path: str) -> None:
    read, by_default = post(server, path, readout=READ), post(server, path)
    assert said(path, read) == said(path, by_default)
    switched_off = post(server, path, readout=READ, steering=[])
    assert said(path, switched_off) == said(path, post(server, path, steering=[]))
    assert readout_of(read)["projections"] != readout_of(switched_off)["projections"]


@pytest.mark.parametrize("path", [path for path, use in USES.items() if use.streamed])
def test_a_stream_is_steered_by_default(server: httpx.Client, path: str) -> None:
    streamed = USES[path].streamed
    assert streamed is not None
    stream = post(server, path, stream=True)
    assert "x-vllm-steer" in stream.headers
    assert streamed(events_of(stream)) == said(path, post(server, path))


def test_one_beam_of_a_search_would_not_be_steered_as_the_default_says(server: httpx.Client) -> None:
    refused = post(server, "/v1/completions", use_beam_search=True, n=2)
    assert refused.status_code == 400
    assert "use_beam_search" in refused.text
