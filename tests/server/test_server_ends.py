"""However a server ends, each of its clients is told in time, and no process is left behind."""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.server.api_server import running
from tests.server.conftest import KIND_LAYER, save_two_directions
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.server]

IN_TIME = 10.0  # seconds in which each client has its answer or an error
ENDED = 40.0  # seconds in which no process is left: a step under way, and four interpreters that end on two cores
NUM_TOKENS = 480  # some seconds of work, of which the signal comes in the middle
STRONG = [{"direction": "kind", "alpha": 50.0}]
READ = {"span": "generated", "project": ["kind"], "trace": ["kind"]}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "steered": {"steering": STRONG}, "read": {"readout": READ}}
# With the core, and the worker below it, in processes of their own, as servers have them.
ENVIRONMENT = {"VLLM_PLUGINS": "vllm_steer", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}


@pytest.fixture(scope="module")
def folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model and its directions are."""
    folder = tmp_path_factory.mktemp("ends")
    save_tiny_model("llama", demo_model, folder / "model")
    save_two_directions(folder / "dirs.safetensors")
    return folder


def _arguments(folder: Path) -> list[str]:
    settings = {"layers": [KIND_LAYER], "directions": [str(folder / "dirs.safetensors")]}
    return [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "model"),
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
    ]


def _processes(server: psutil.Process) -> dict[str, psutil.Process]:
    """The front end, the engine core below it, and the worker below that."""
    (core,) = [child for child in server.children() if "EngineCore" in child.cmdline()[0]]
    (worker,) = [child for child in core.children() if "Worker" in child.cmdline()[0]]
    return {"front end": server, "engine": core, "worker": worker}


def _ask(url: str, fields: dict[str, Any], stream: bool, has_begun: threading.Event) -> str:
    """How one client's request ends: the reason why its answer does, or an error."""
    body = {
        "model": "tiny",
        "prompt": "Once upon a time",
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        **fields,
    }
    try:
        if not stream:
            has_begun.set()
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            return f"{reply.status_code} {_end(reply.text)}"
        last = ""
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as events:
            for line in events.iter_lines():
                has_begun.set()
                if line not in ("", "data: [DONE]"):
                    last = line.removeprefix("data: ")
        return f"stream {_end(last)}"
    except httpx.TransportError as error:
        return repr(error)


def _end(text: str) -> str:
    fields = json.loads(text)
    return str(fields["error"]["message"] if "error" in fields else fields["choices"][0]["finish_reason"])


_BREADTH = pytest.mark.breadth  # each case starts a server: a part of them is enough for every run of the tests


@pytest.mark.parametrize(
    ("whom", "how"),
    [
        ("engine", signal.SIGKILL),
        pytest.param("worker", signal.SIGKILL, marks=_BREADTH),
        pytest.param("front end", signal.SIGTERM, marks=_BREADTH),
        pytest.param("front end", signal.SIGKILL, marks=_BREADTH),
        pytest.param("engine", signal.SIGTERM, marks=_BREADTH),
        pytest.param("worker", signal.SIGTERM, marks=_BREADTH),
    ],
)
def test_each_client_is_told_and_nothing_is_left(folder: Path, tmp_path: Path, whom: str, how: signal.Signals) -> None:
    log = tmp_path / "server.log"
    asks = [(fields, stream) for fields in KINDS.values() for stream in (True, False)]
    begun = [threading.Event() for _ in asks]
    with running(_arguments(folder), log, **ENVIRONMENT) as server, ThreadPoolExecutor(len(asks)) as pool:
        processes = _processes(server.process)
        everything = [server.process, *server.process.children(recursive=True)]
        told = [pool.submit(_ask, server.url, *ask, event) for ask, event in zip(asks, begun, strict=True)]
        assert all(event.wait(60) for event in begun)
        time.sleep(0.3)  # those that are not streamed are in the engine too by now
        assert not any(one.done() for one in told)
        sent = time.monotonic()
        processes[whom].send_signal(how)
        ends = [one.result(max(0.1, sent + IN_TIME - time.monotonic())) for one in told]
        _, alive = psutil.wait_procs(everything, timeout=max(0.1, sent + ENDED - time.monotonic()))
        left = [process.name() for process in alive]
        for process in alive:
            process.kill()
    print(dict(zip(((kind, stream) for kind in KINDS for stream in (True, False)), ends, strict=True)))
    assert left == []
    assert "Task exception was never retrieved" not in log.read_text(errors="replace")
    # In the middle of its work: nobody has got all of it, and nobody takes a part of it for the whole.
    assert not [end for end in ends if end.endswith(("length", "None"))]
