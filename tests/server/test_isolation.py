"""No request to a server can spoil another one through the KV cache, in any dtype of the stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.conftest import API_KEY, running_server
from tests.support.mixed_batch import random_prompts, unit_vectors
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE, save_tiny_model
from vllm_steer import Direction, save_directions
from vllm_steer.ops.stream_range import LARGEST_ADDITION

pytestmark = [pytest.mark.slow, pytest.mark.server]

NUM_BLOCKS, BLOCK_SIZE = 12, 32  # vLLM's block on CPUs
KIND = unit_vectors([1], HIDDEN_SIZE, seed=91)["calm", 1]
# Ends at many places of a block, behind which lies what an earlier request has left there.
PLAIN = random_prompts(VOCAB_SIZE, lengths=(1, 5, 20, 31, 33, 70), seed=93)
LONG = random_prompts(VOCAB_SIZE, lengths=(60, 61, 70), seed=92)


def _complete(client: httpx.Client, tokens: list[int], **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": tokens, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body)


def _plain(client: httpx.Client) -> list[Any]:
    """Tokens and log-probabilities of unsteered requests."""
    replies = [_complete(client, tokens, logprobs=1, return_token_ids=True) for tokens in PLAIN]
    choices = [reply.json()["choices"][0] for reply in replies]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


_BREADTH = pytest.mark.breadth  # each starts a server; float16 has the narrowest range, so it alone is always run


@pytest.mark.parametrize(
    "dtype", ["float16", pytest.param("bfloat16", marks=_BREADTH), pytest.param("float32", marks=_BREADTH)]
)
def test_plain_requests_are_the_same_before_and_after_others_steered_as_far_as_they_may(
    demo_model: Path, tmp_path: Path, dtype: str
) -> None:
    model = save_tiny_model("gpt2", demo_model, tmp_path / "model")
    save_directions(tmp_path / "dirs.safetensors", [Direction("kind", 1, KIND)])
    layers = list(range(NUM_LAYERS))
    settings = {"layers": layers, "directions": [str(tmp_path / "dirs.safetensors")], "max_alpha": 1e30}
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--num-gpu-blocks-override",
        str(NUM_BLOCKS),
        "--block-size",
        str(BLOCK_SIZE),
        "--no-enable-prefix-caching",
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
    )
    most = LARGEST_ADDITION[dtype] / float(np.abs(KIND).max())
    with (
        running_server(command, tmp_path / "server.log", dtype=dtype, VLLM_PLUGINS="vllm_steer") as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client,
    ):
        before = _plain(client)
        assert np.isfinite([value for _, told in before for value in told]).all()
        refused = _complete(client, LONG[0], steering=[{"direction": "kind", "alpha": 1.01 * most}])
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_alpha")

        asked = 0
        for sign in (0.999, -0.999):
            for span in ("all", "prompt", "generated"):
                entries = [
                    {"direction": "kind", "alpha": sign * most, "layer": layer, "span": span} for layer in layers
                ]
                for tokens in LONG:
                    asked += len(tokens)
                    reply = _complete(client, tokens, steering=entries)
                    if dtype != "float16":
                        assert reply.status_code == 200, reply.text
                        continue
                    assert reply.status_code == 400, reply.text
                    assert reply.json()["error"]["code"] == "stream_overflow"
                    assert "float16" in reply.json()["error"]["message"]
                    stream = _complete(client, tokens, steering=entries, stream=True)
                    assert '"stream_overflow"' in stream.text
                    assert '"finish_reason":"' not in stream.text  # it has not ended as a whole answer does
        assert asked > NUM_BLOCKS * BLOCK_SIZE  # so every block has been theirs
        assert _plain(client) == before
