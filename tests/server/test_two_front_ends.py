"""`vllm-steer serve` with two API server processes, in front of one engine and of two data-parallel ones.

What one front end registers, both serve at once from every engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.conftest import ADMIN_KEY, API_KEY, KIND_LAYER, running_server
from tests.support.tiny_models import HIDDEN_SIZE, save_tiny_model
from vllm_steer import Direction
from vllm_steer.engine.front.slot_use_files import SlotUse

pytestmark = [pytest.mark.slow, pytest.mark.server]

FRONT_ENDS, JOIN_SECONDS = 2, 120.0
LOOKS = 12  # either front end may take each new connection: all go to one of them once in 2 ** 11 times
HEADERS = {"Authorization": f"Bearer {API_KEY}", "X-Admin-Key": ADMIN_KEY}
STEERED = {"steering": [{"direction": "kind", "alpha": 50.0}], "readout": {"project": ["kind"], "span": "all"}}
RNG = np.random.default_rng(3)


# Five processes on two cores take minutes to start.
@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.breadth)])
def ranks(request: pytest.FixtureRequest) -> int:
    """How many engines stand behind the front ends."""
    assert isinstance(request.param, int)
    return request.param


@pytest.fixture(scope="module")
def url(ranks: int, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("two")
    command = (
        "-c",
        "from batch_jobs.cli.main import main; main()",
        "serve",
        str(save_tiny_model("llama", demo_model, folder / "model")),
        "--layers",
        str(KIND_LAYER),
        "--registry-dir",
        str(folder / "registry"),
        "--api-server-count",
        str(FRONT_ENDS),
        "--data-parallel-size",
        str(ranks),
    )
    cores = "|".join(str(core) for core in range(ranks))
    log = folder / "server.log"
    with running_server(command, log, VLLM_CPU_OMP_THREADS_BIND=cores) as url:
        deadline = time.monotonic() + JOIN_SECONDS
        while len(SlotUse.living(folder / "registry" / "use")) < FRONT_ENDS:
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        yield url


def _register(url: str) -> str:
    """Give "kind" a new vector; returns its tag."""
    direction = Direction("kind", KIND_LAYER, RNG.standard_normal(HIDDEN_SIZE)).normalised()
    changed = httpx.put(
        f"{url}/v1/steering/directions/kind",
        params={"layer": KIND_LAYER},
        content=direction.vector.tobytes(),
        headers=HEADERS,
        timeout=60,
    )
    assert changed.is_success, changed.text
    return changed.headers["ETag"]


def _ask(url: str, rank: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Ask one engine over a new connection."""
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, **fields}
    headers = {**HEADERS, "X-data-parallel-rank": str(rank)}
    reply = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    assert reply.is_success, reply.text
    answer: dict[str, Any] = reply.json()["choices"][0]
    return answer


def _finished(url: str, ranks: int) -> dict[int, float]:
    """The requests that each engine has finished, by vLLM's own metrics."""
    counts = dict.fromkeys(range(ranks), 0.0)
    for line in httpx.get(f"{url}/metrics", headers=HEADERS, timeout=60).text.splitlines():
        if line.startswith("vllm:request_success_total{"):
            labels, value = line.rsplit(" ", 1)
            counts[int(labels.split('engine="')[1].split('"')[0])] += float(value)
    return counts


@pytest.mark.conformance("data parallelism in the server", family="llama")
def test_all_agree_on_what_is_registered(url: str, ranks: int) -> None:
    texts = set()
    for _ in range(3):
        tag = _register(url)
        tags = {
            httpx.get(f"{url}/v1/steering/directions/kind", headers=HEADERS, timeout=60).headers["ETag"]
            for _ in range(LOOKS)
        }
        assert tags == {tag}
        before = _finished(url, ranks)
        answers = [_ask(url, look % ranks, STEERED) for look in range(LOOKS)]
        after = _finished(url, ranks)
        assert all(after[rank] - before[rank] == LOOKS / ranks for rank in range(ranks)), (before, after)
        said = {answer["text"] for answer in answers}
        assert len(said) == 1, "the engines steer along different vectors"
        texts |= said
        reads = [answer["readout"] for answer in answers]
        # One model and the same tokens on each engine: their values may differ by the rounding of their batches alone.
        values = np.array([[*read["projections"]["kind"].values()] for read in reads])
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values, values[:1].repeat(len(values), axis=0), rtol=1e-4)
    assert len(texts) == 3, "a replaced vector went on steering"
    assert _ask(url, 0, {})["text"] == _ask(url, ranks - 1, {})["text"] not in texts
    assert httpx.delete(f"{url}/v1/steering/directions/kind", headers=HEADERS, timeout=60).is_success
    for _ in range(LOOKS):
        assert httpx.get(f"{url}/v1/steering/directions/kind", headers=HEADERS, timeout=60).status_code == 404
