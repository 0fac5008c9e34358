"""vLLM's server, run in the project's own environment, and its answers to a plain HTTP client.

The tests of this folder run in an environment of clients, without an engine (`make test-clients`). Each file covers one
client and shows the code that its users write. All tests ask the same question, so one pair of texts, plain and
steered, tells whether a client's answer was steered.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

PROJECT = Path(__file__).resolve().parents[2]
SERVER_PYTHON = PROJECT / ".venv" / "bin" / "python"

MODEL, ALIAS, ALPHA = "tiny", "tiny-kind", 50.0
API_KEY = "secret"  # the one of tests/server
PROMPT = "Once upon a time there was"
MESSAGES = [{"role": "user", "content": PROMPT}]
NUM_TOKENS = 8
STEERING = [{"direction": "kind", "alpha": ALPHA}]
READOUT = {"span": "generated", "project": ["kind"]}
REFUSED = [{"direction": "nobody", "alpha": 1}]
REFUSAL = "unknown_direction"  # the code of the answer to `REFUSED`

# A client must neither look for its vendor's server nor report home.
os.environ.update({"DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"})


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: where it listens, without a path.
        tokenizer: the folder of the model, whose tokenizer a client may load.
        layer: where "kind" steers.
        log: what the server printed, with a line for each answer.
    """

    url: str
    tokenizer: str
    layer: int
    log: Path

    @property
    def base_url(self) -> str:
        """The address that clients of OpenAI's API expect."""
        return f"{self.url}/v1"

    def answers(self, path: str, status: int) -> int:
        """How many requests to ``path`` have been answered with ``status`` so far."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(f'POST {path} HTTP/1.1" {status}' in line for line in lines)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a tiny model, run by the project's own environment until the tests end."""
    folder = tmp_path_factory.mktemp("server")
    command = (str(SERVER_PYTHON), "-m", "tests.clients.serve", str(folder), ALIAS, str(ALPHA))
    # The child stops its server when its stdin ends, also when this process is killed.
    with subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            lines = iter(child.stdout)
            said = json.loads(next((line for line in lines if line.startswith('{"url"')), "null"))
            assert said is not None, "the server did not start: its error is above"
            yield Served(said["url"], said["tokenizer"], said["layer"], folder / "server.log")
        finally:
            child.stdin.close()
            child.wait(90)


def ask(served: Served, path: str, **fields: Any) -> dict[str, Any]:
    """The server's answer to a plain HTTP client's greedy request of ``NUM_TOKENS`` tokens."""
    body = {"model": MODEL, "max_tokens": NUM_TOKENS, "temperature": 0, **fields}
    headers = {"Authorization": f"Bearer {API_KEY}"}
    reply = httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def kept(served: Served, reply_id: str | None) -> list[dict[str, Any]]:
    """The readouts of a finished reply, by its id: for clients that drop them."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    reply = httpx.get(f"{served.url}/v1/steering/readouts/{reply_id}", headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return [one["readout"] for one in reply.json()["readouts"]]


@dataclass(frozen=True)
class Texts:
    """The server's answers to ``PROMPT``, plain and steered by ``STEERING``."""

    plain: str
    steered: str


@pytest.fixture(scope="session")
def chat_texts(served: Served) -> Texts:
    """The answers to ``MESSAGES`` on the chat routes."""
    asked = (ask(served, "/v1/chat/completions", messages=MESSAGES, steering=spec) for spec in ([], STEERING))
    texts = Texts(*(answer["choices"][0]["message"]["content"] for answer in asked))
    assert texts.plain != texts.steered
    return texts


@pytest.fixture(scope="session")
def completion_texts(served: Served) -> Texts:
    """The answers to ``PROMPT`` on the route of bare texts."""
    asked = (ask(served, "/v1/completions", prompt=PROMPT, steering=spec) for spec in ([], STEERING))
    texts = Texts(*(answer["choices"][0]["text"] for answer in asked))
    assert texts.plain != texts.steered
    return texts
