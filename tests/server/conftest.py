"""One server for all tests of this folder: vLLM's own OpenAI-compatible server, in a separate process.

It serves a tiny random llama as ``tiny``. Two directions come from a file: ``kind`` at layer 2, ``other`` at layer 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.server.api_server import running
from tests.support.tiny_models import HIDDEN_SIZE, save_tiny_model
from vllm_steer import Direction, save_directions

KIND_LAYER, OTHER_LAYER = 2, 1
API_KEY, LIMITED_KEY, ADMIN_KEY = "secret", "limited", "admin-secret"
ORIGIN = "https://elsewhere.example"  # of scripts that may use the server
ALIAS, ALIAS_ALPHA = "tiny-kind", 50.0


@dataclass(frozen=True)
class ServedModel:
    """The server of these tests and its contents.

    Attributes:
        url: where it listens, without a path.
        model: the checkpoint's folder.
        directions: "kind" and "other". It was also started with "wide", the vector of "kind" at its layer and at one
            that is not hooked.
    """

    url: str
    model: Path
    directions: tuple[Direction, ...]


_servers = ExitStack()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Stop the server after the last test of this folder: an idle one takes a quarter of a core from other tests."""
    yield
    if nextitem is None or nextitem.path.parent != item.path.parent:
        _servers.close()


@pytest.fixture(scope="session")
def served(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """The running server; API keys are ``API_KEY`` and ``LIMITED_KEY``, which may name only "kind"."""
    folder = tmp_path_factory.mktemp("server")
    model = save_tiny_model("llama", demo_model, folder / "model")
    directions = save_two_directions(folder / "dirs.safetensors")
    wide = [Direction("wide", layer, directions[0].vector) for layer in (KIND_LAYER, KIND_LAYER + 1)]
    save_directions(folder / "wide.safetensors", wide)
    settings = {
        "layers": [OTHER_LAYER, KIND_LAYER],
        "directions": [str(folder / name) for name in ("dirs.safetensors", "wide.safetensors")],
        "served_aliases": {ALIAS: [{"direction": "kind", "alpha": ALIAS_ALPHA}]},
        "allowed_directions": {f"key:{sha256(LIMITED_KEY.encode()).hexdigest()[:12]}": ["kind"]},
        "registry_dir": str(folder / "registry"),
        "playground": True,
        "steering_in_model_names": True,
    }
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--enable-scale-out",
        "--allowed-origins",
        json.dumps([ORIGIN]),
    )
    # Switch on every route that one server can have.
    routes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_COHERE_API": "1"}
    url = _servers.enter_context(running_server(command, folder / "server.log", VLLM_PLUGINS="vllm_steer", **routes))
    return ServedModel(url, model, directions)


@pytest.fixture(scope="session")
def server(served: ServedModel) -> Iterator[httpx.Client]:
    """A client of the server, with the API key that may do everything but change directions."""
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client:
        yield client


def save_two_directions(path: Path) -> tuple[Direction, Direction]:
    """Save "kind" at layer ``KIND_LAYER`` and "other" at ``OTHER_LAYER``, both random and of length 1."""
    vectors = np.random.default_rng(0).standard_normal((2, HIDDEN_SIZE))
    kind = Direction("kind", KIND_LAYER, vectors[0]).normalised()
    other = Direction("other", OTHER_LAYER, vectors[1]).normalised()
    save_directions(path, [kind, other])
    return kind, other


@contextmanager
def running_server(command: Sequence[str], log: Path, dtype: str = "float32", **environment: str) -> Iterator[str]:
    """Start a server by Python's arguments ``command``, which name model and settings; yield its URL once it is
    healthy, and stop it at the end. Its model is called "tiny"."""
    whole = [
        *command,
        "--served-model-name",
        "tiny",
        "--api-key",
        API_KEY,
        LIMITED_KEY,
        "--dtype",
        dtype,
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--kv-cache-memory-bytes",
        str(64 << 20),
    ]
    with running(whole, log, **{"VLLM_STEER_ADMIN_KEY": ADMIN_KEY, **environment}) as server:
        yield server.url
