"""A chat with a picture over HTTP is steered and read as Hugging Face's hooks do it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL.Image import Image

from tests.server.conftest import API_KEY, KIND_LAYER, OTHER_LAYER, running_server, save_two_directions
from tests.support.hf_reference import Entry, Reference, ReferenceRun
from tests.support.mixed_batch import NEAR_TIE, READOUT_TOLERANCE, TRACE_TOLERANCE
from tests.support.tiny_images import WRAPPERS, picture, processed, save_tiny_wrapper
from vllm_steer import Direction

# A server of its own; the same positions are compared offline in every run of the tests.
pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.breadth]

FAMILY = "Qwen3VLForConditionalGeneration"
GENERATED = 12
QUESTION = "What is shown here?"
STEERING = [
    {"direction": "other", "alpha": 12.0, "op": "set", "span": "prompt"},
    {"direction": "kind", "alpha": 15.0, "span": "generated"},
]


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wrapper(FAMILY, demo_model, tmp_path_factory.mktemp("images") / "model")


@pytest.fixture(scope="module")
def directions(model: Path) -> dict[str, Direction]:
    return {one.name: one for one in save_two_directions(model.parent / "dirs.safetensors")}


@pytest.fixture(scope="module")
def server(model: Path, directions: dict[str, Direction]) -> Iterator[httpx.Client]:
    settings = {"layers": [OTHER_LAYER, KIND_LAYER], "directions": [str(model.parent / "dirs.safetensors")]}
    command = (
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--limit-mm-per-prompt",
        json.dumps({"image": 1, "video": 0}),
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
    )
    with (
        running_server(command, model.parent / "server.log", VLLM_PLUGINS="vllm_steer") as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {API_KEY}"}, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def ask(server: httpx.Client, shown: Image, **fields: Any) -> dict[str, Any]:
    """The reply to a chat with a picture, as a client sends it: a data URL before the words."""
    file = io.BytesIO()
    shown.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": GENERATED,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    reply = server.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def run_of(
    reference: Reference, model: Path, shown: Image, reply: dict[str, Any], steering: list[Entry]
) -> ReferenceRun:
    """The reference's run with the reply's tokens, which are its own choice, of the same prompt."""
    text = f"<|im_start|>user\n{WRAPPERS[FAMILY].picture}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids, inputs = processed(FAMILY, model, text, [shown])
    assert reply["prompt_token_ids"] == ids
    assert reply["usage"]["prompt_tokens"] == len(ids)
    reference.show(ids, inputs)
    run = reference.confirm(ids, reply["choices"][0]["token_ids"], steering)
    assert min(run.top2_gaps) > NEAR_TIE
    assert run.tokens == reply["choices"][0]["token_ids"]
    return run


def entries(directions: dict[str, Direction]) -> list[Entry]:
    named = [(directions[one["direction"]], one) for one in STEERING]
    return [
        {"op": "add", **one, "layer": direction.layer, "vector": direction.vector.copy()} for direction, one in named
    ]


@pytest.mark.conformance("images", family=FAMILY)
@pytest.mark.parametrize("readout", [{"span": "prompt", "skip_first": 6}, {"span": "all"}, {"span": "generated"}])
def test_a_chat_with_a_picture_is_steered_and_read_as_hugging_face_does_it(
    server: httpx.Client, reference: Reference, model: Path, directions: dict[str, Direction], readout: dict[str, Any]
) -> None:
    shown = picture(1, 84, 56)
    asked = {"layers": [OTHER_LAYER, KIND_LAYER], "vectors": True, "project": ["kind"], "trace": ["kind"], **readout}
    reply = ask(server, shown, steering=STEERING, readout=asked)
    run = run_of(reference, model, shown, reply, entries(directions))
    assert ask(server, shown)["choices"][0]["token_ids"] != run.tokens

    read, kind = reply["choices"][0]["readout"], directions["kind"].vector
    rows = run.rows(KIND_LAYER, readout["span"], readout.get("skip_first", 0))
    assert read["num_tokens"] == len(rows)
    for layer in (OTHER_LAYER, KIND_LAYER):
        mean = np.frombuffer(base64.b64decode(read["mean"][str(layer)]), "<f4")
        truth = run.mean(layer, readout["span"], readout.get("skip_first", 0))
        assert np.linalg.norm(mean - truth) < READOUT_TOLERANCE * np.linalg.norm(truth)
    off = np.abs(read["trace"]["kind"]["values"] - rows @ kind) / np.linalg.norm(rows, axis=1)
    assert off.max() < TRACE_TOLERANCE
    projected = read["projections"]["kind"][str(KIND_LAYER)]
    assert abs(projected - rows.mean(axis=0) @ kind) < READOUT_TOLERANCE * np.linalg.norm(rows.mean(axis=0))


def test_two_pictures_under_the_same_words_have_two_answers(
    server: httpx.Client, reference: Reference, model: Path, directions: dict[str, Direction]
) -> None:
    told = []
    for seed in (1, 2, 1):
        shown = picture(seed, 84, 56)
        reply = ask(server, shown, steering=STEERING)
        told.append(run_of(reference, model, shown, reply, entries(directions)).tokens)
    assert told[0] == told[2] != told[1]
