"""vLLM's offline batch runner, in a separate process: the bodies of its lines work as HTTP bodies do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import ALIAS, KIND_LAYER, save_two_directions
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.server]

STRONG = [{"direction": "kind", "alpha": 50.0}]
CHAT = {"messages": [{"role": "user", "content": "Once upon a time there was"}], "max_tokens": 8, "temperature": 0}
LINES: dict[str, dict[str, Any]] = {
    "says-nothing": {},
    "explicitly-plain": {"steering": []},
    "steered": {"steering": STRONG},
    "alias": {"model": ALIAS},
    "read": {"steering": STRONG, "readout": {"project": ["kind"], "span": "generated"}},
    "through-xargs": {"vllm_xargs": {"vllm_steer": json.dumps({"steering": STRONG})}},
    "unknown": {"steering": [{"direction": "nobody", "alpha": 1.0}]},
    "malformed": {"steering": [{"direction": "kind"}]},
    "misplaced": {"extra_body": {"steering": STRONG}},
}
DEFAULT = [{"direction": "kind", "alpha": -50.0}]


@pytest.fixture(scope="module")
def replies(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one run wrote for each of ``LINES``, with a default steering that none of them asks for."""
    folder = tmp_path_factory.mktemp("batch_runner")
    model = save_tiny_model("llama", demo_model, folder / "model")
    save_two_directions(folder / "dirs.safetensors")
    settings = {
        "layers": [KIND_LAYER],
        "directions": [str(folder / "dirs.safetensors")],
        "served_aliases": {ALIAS: STRONG},
        "default_steering": DEFAULT,
    }
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", **CHAT, **body}}
        for name, body in LINES.items()
    ]
    scored = {"model": "tiny", "text_1": "one", "text_2": "two", "steering": STRONG}
    lines.append({"custom_id": "scored", "method": "POST", "url": "/v1/score", "body": scored})
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.run_batch",
            "-i",
            str(folder / "in.jsonl"),
            "-o",
            str(folder / "out.jsonl"),
            "--model",
            str(model),
            "--served-model-name",
            "tiny",
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "256",
            "--kv-cache-memory-bytes",
            str(64 << 20),
            "--additional-config",
            json.dumps({"vllm_steer": settings}),
        ],
        check=True,
        timeout=300,
    )
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len(written) == len(lines)
    return {line["custom_id"]: line for line in written}


def _text(reply: dict[str, Any]) -> str:
    assert (reply["error"], reply["response"]["status_code"]) == (None, 200), reply
    return str(reply["response"]["body"]["choices"][0]["message"]["content"])


def _refusal(reply: dict[str, Any]) -> dict[str, Any]:
    """The error of a line that was refused."""
    assert (reply["response"]["status_code"], reply["response"]["body"]) == (400, None), reply
    error: dict[str, Any] = reply["error"]["error"]
    return error


def test_lines_are_steered_as_they_ask_and_by_the_default_where_they_do_not(replies: dict[str, dict[str, Any]]) -> None:
    by_default, plain, steered = (_text(replies[name]) for name in ("says-nothing", "explicitly-plain", "steered"))
    assert len({by_default, plain, steered}) == 3
    assert steered == _text(replies["alias"]) == _text(replies["through-xargs"]) == _text(replies["read"])


def test_a_readout_stands_in_the_line_s_reply(replies: dict[str, dict[str, Any]]) -> None:
    body = replies["read"]["response"]["body"]
    (choice,) = body["choices"]
    # It was steered by 50 times this very direction, of length 1.
    assert choice["readout"]["projections"]["kind"][str(KIND_LAYER)] > 40.0
    assert "readout" not in replies["steered"]["response"]["body"]["choices"][0]


def test_a_line_that_cannot_be_honoured_is_an_error_of_that_line(replies: dict[str, dict[str, Any]]) -> None:
    assert "no direction is named 'nobody'" in str(_refusal(replies["unknown"]))
    assert "alpha" in str(_refusal(replies["malformed"]))
    assert "'steering' in 'extra_body'" in str(_refusal(replies["misplaced"]))
    assert replies["scored"]["response"]["status_code"] != 200
