"""The recipes of docs/guides/harness.md for load tools and Ray Data, run as written against `vllm-steer serve`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.server.api_server import running
from tests.docs.blocks import ROOT, SERVER_URL, Block, blocks_in, run_bash, run_script
from tests.support.tiny_models import HIDDEN_SIZE, save_tiny_model
from vllm_steer import Direction, save_directions

LAYER = 16  # the page's
PAGE = "docs/guides/harness.md"
BLOCKS = blocks_in(PAGE, (ROOT / PAGE).read_text(encoding="utf-8"))
NUM_REQUESTS = 64  # of both load tools' commands
READ_ALPHA = 1.0  # of the row that asks the engine stage for a readout
ENGINE_CHANGES = {
    '"dtype": "float32"': '"dtype": "float32", "enforce_eager": True, "max_model_len": 256, '
    '"kv_cache_memory_bytes": 1 << 26',
    "placement_group_config=": "should_continue_on_error=True,\n    placement_group_config=",
    "    extra_args = ": f"""    if row["alpha"] == {READ_ALPHA}:
        spec["readout"] = {{"layers": [{LAYER}], "project": ["empathy"]}}
    extra_args = """,
    ")(prompts)": f')(prompts.union(ray.data.from_items([{{"prompt": "How?", "alpha": {READ_ALPHA}}}])))',
}
"""What is changed in the page's engine stage: a small engine, and one row more, whose refusal ends only itself."""

pytestmark = [pytest.mark.server, pytest.mark.slow]


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where it listens, without a path.
        model: the folder of its model, with the tokenizer.
        directions: the file with "empathy".
    """

    url: str
    model: Path
    directions: Path

    def steered(self) -> float:
        """How many requests "empathy" has steered so far."""
        metrics = httpx.get(f"{self.url}/metrics").raise_for_status().text
        found = re.findall(r'^vllm_steer_requests_total\{direction="empathy"\} (\S+)$', metrics, re.MULTILINE)
        return sum(map(float, found))

    def ask(self, alpha: float) -> tuple[str, float]:
        """The text and the projection of a plain client's request for what the page asks Ray Data for."""
        steering = [{"direction": "empathy", "alpha": alpha}]
        readout = {"project": ["empathy"], "span": "generated"}
        body = {"prompt": "How was your day?", "max_tokens": 24, "temperature": 0, "steering": steering}
        reply = httpx.post(f"{self.url}/v1/completions", json={"model": "demo-model", "readout": readout, **body})
        [choice] = reply.raise_for_status().json()["choices"]
        return choice["text"], choice["readout"]["projections"]["empathy"][str(LAYER)]

    def adapted(self, block: Block) -> Block:
        """The block with this server's model and directions; the runner replaces the address."""
        source = block.source.replace("MODEL_FOLDER", str(self.model)).replace("dirs.safetensors", str(self.directions))
        return replace(block, source=source)


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny random llama that is as deep as the page asks for, served as "demo-model"."""
    folder = tmp_path_factory.mktemp("server")
    model = save_tiny_model("LlamaForCausalLM", demo_model, folder / "model", changes={"num_hidden_layers": LAYER + 1})
    directions = folder / "dirs.safetensors"
    vector = np.random.default_rng(1).standard_normal(HIDDEN_SIZE)
    save_directions(directions, [Direction("empathy", LAYER, vector).normalised()])
    command = ("-c", "from batch_jobs.cli.command import main; main()", "serve", str(model))
    options = {"directions": directions, "served-model-name": "demo-model", "dtype": "float32", "max-model-len": 256}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    small = ("--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26))
    with running((*command, *words, *small), folder / "server.log") as served:
        yield Server(served.url, model, directions)


def block_with(words: str) -> Block:
    [found] = [block for block in BLOCKS if words in block.source]
    return found


def test_vllms_own_load_tool_steers_every_request(server: Server, tmp_path: Path) -> None:
    options = server.adapted(block_with("vllm bench serve"))
    program = block_with("serve.add_cli_args").source.strip()
    # On a CPU the command vllm does not start, and the page's line stands for it.
    whole = f'vllm() {{ shift 2; {program} "$@"; }}\n{options.source}'
    before = server.steered()
    printed = run_bash(replace(options, source=whole), tmp_path, url=server.url)
    assert re.findall(r"(Successful|Failed) requests: +(\d+)", printed) == [
        ("Successful", str(NUM_REQUESTS)),
        ("Failed", "0"),
    ]
    assert server.steered() - before == NUM_REQUESTS


@pytest.mark.skipif(
    shutil.which("guidellm") is None,
    reason="guidellm is not on the PATH; its click is older than that of the clients' environment",
)
def test_guidellm_steers_every_request(server: Server, tmp_path: Path) -> None:
    before = server.steered()
    run_bash(server.adapted(block_with("guidellm run")), tmp_path, url=server.url)
    [benchmark] = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)
    assert server.steered() - before == NUM_REQUESTS


@pytest.fixture(scope="module")
def ray_rows(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's two stages return, and the replies of the first one to requests that the server refuses."""
    blocks = [
        server.adapted(block_with(words)) for words in ("HttpRequestProcessorConfig(", "vLLMEngineProcessorConfig(")
    ]
    refused = """
def wrong(row):
    return {"payload": {**request(row)["payload"], "steering": [{"direction": "nobody", "alpha": 1}]}}


def reply(row):
    return {"reply": json.dumps(row["http_response"])}


http = HttpRequestProcessorConfig(url="http://127.0.0.1:8000/v1/completions")
replies = build_processor(http, preprocess=wrong, postprocess=reply)(prompts).take_all()
print("ROWS", json.dumps({"http": answers, "engine": own, "refused": [json.loads(row["reply"]) for row in replies]}))
"""
    engine = blocks[1].source
    for own, changed in ENGINE_CHANGES.items():
        assert engine.count(own) == 1
        engine = engine.replace(own, changed)
    script = [blocks[0], replace(blocks[1], source=engine), replace(blocks[1], source=refused)]
    assert all(SERVER_URL in block.source for block in (script[0], script[2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ADDRESS", "local")  # not a cluster that runs here already
        printed = run_script(script, tmp_path_factory.mktemp("ray"), server.url)
    [line] = re.findall(r"^ROWS (.*)$", printed, re.MULTILINE)
    rows: dict[str, Any] = json.loads(line)
    return rows


@pytest.mark.breadth  # Ray and another engine: minutes
def test_ray_datas_http_stage_steers_and_reads_each_row(server: Server, ray_rows: dict[str, Any]) -> None:
    rows = sorted(ray_rows["http"], key=lambda row: row["alpha"])
    assert [row["alpha"] for row in rows] == [-28, 0, 28]
    assert len({row["text"] for row in rows}) == len(rows)
    for row in rows:
        text, projection = server.ask(row["alpha"])
        assert row["text"] == text
        assert row["empathy"] == pytest.approx(projection, rel=1e-5)  # another batch may move the last bits
    assert rows[0]["empathy"] < rows[1]["empathy"] - 1 < rows[2]["empathy"] - 2


@pytest.mark.breadth  # Ray and another engine: minutes
def test_ray_datas_http_stage_returns_a_refusal_as_a_reply(ray_rows: dict[str, Any]) -> None:
    assert ray_rows["refused"]
    for reply in ray_rows["refused"]:
        assert "nobody" in reply["error"]["message"]
        assert "choices" not in reply


@pytest.mark.breadth  # Ray and another engine: minutes
def test_ray_datas_engine_stage_steers_each_row(server: Server, ray_rows: dict[str, Any]) -> None:
    texts = {row["alpha"]: row["text"] for row in ray_rows["engine"] if not row["__inference_error__"]}
    assert texts == {alpha: server.ask(alpha)[0] for alpha in (-28, 0, 28)}
    assert len(set(texts.values())) == len(texts)


@pytest.mark.breadth  # Ray and another engine: minutes
def test_ray_datas_engine_stage_refuses_a_readout_which_it_would_lose(ray_rows: dict[str, Any]) -> None:
    [refused] = [row for row in ray_rows["engine"] if row["__inference_error__"]]
    assert refused["alpha"] == READ_ALPHA
    assert "a readout was requested in Ray Data's LLM stage" in refused["__inference_error__"]
