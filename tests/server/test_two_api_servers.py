"""`vllm-steer serve` with two API server processes in front of one engine: what one registers the other serves at
once."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.server.conftest import ADMIN_KEY, API_KEY, KIND_LAYER, running_server
from tests.support.tiny_models import HIDDEN_SIZE, save_tiny_model
from vllm_steer import Direction
from vllm_steer.engine.front.slot_use_files import SlotUse

pytestmark = [pytest.mark.slow, pytest.mark.server]

PROCESSES, JOIN_SECONDS, LOOKS = 2, 120.0, 12
RNG = np.random.default_rng(3)


def test_both_agree_on_what_is_registered(demo_model: Path, tmp_path: Path) -> None:
    model = save_tiny_model("llama", demo_model, tmp_path / "model")
    headers = {"Authorization": f"Bearer {API_KEY}", "X-Admin-Key": ADMIN_KEY}
    command = (
        "-c",
        "from batch_jobs.cli.main import main; main()",
        "serve",
        str(model),
        "--layers",
        str(KIND_LAYER),
        "--registry-dir",
        str(tmp_path / "registry"),
        "--api-server-count",
        str(PROCESSES),
    )
    with running_server(command, tmp_path / "server.log") as url:
        deadline = time.monotonic() + JOIN_SECONDS
        while len(SlotUse.living(tmp_path / "registry" / "use")) < PROCESSES:
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        texts = set()
        for _ in range(3):
            direction = Direction("kind", KIND_LAYER, RNG.standard_normal(HIDDEN_SIZE)).normalised()
            changed = httpx.put(
                f"{url}/v1/steering/directions/kind",
                params={"layer": KIND_LAYER},
                content=direction.vector.tobytes(),
                headers=headers,
                timeout=60,
            )
            assert changed.is_success, changed.text
            # Either process may take each new connection.
            tags = {
                httpx.get(f"{url}/v1/steering/directions/kind", headers=headers, timeout=60).headers["ETag"]
                for _ in range(LOOKS)
            }
            assert tags == {changed.headers["ETag"]}
            body = {
                "model": "tiny",
                "prompt": "Once upon a time",
                "max_tokens": 16,
                "temperature": 0,
                "steering": [{"direction": "kind", "alpha": 50.0}],
            }
            replies = [
                httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60) for _ in range(LOOKS)
            ]
            said = {reply.json()["choices"][0]["text"] for reply in replies}
            assert len(said) == 1, "the processes steer along different vectors"
            texts |= said
        assert len(texts) == 3, "a replaced vector went on steering"
        assert httpx.delete(f"{url}/v1/steering/directions/kind", headers=headers, timeout=60).is_success
        for _ in range(LOOKS):
            assert httpx.get(f"{url}/v1/steering/directions/kind", headers=headers, timeout=60).status_code == 404
