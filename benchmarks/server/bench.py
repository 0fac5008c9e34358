"""A server under a mix of steered, unsteered and invalid requests, against unsteered ones alone and a stock server.

    python -m benchmarks.server.bench [--requests 2000] [--clients 64] [--rounds 15] [--tokens 16] [--out FILE]

Two servers of the same model run one after the other. The first is vLLM without the plugin; unsteered requests must get
its replies. The second has the plugin. The requests are split over the rounds, and every round runs the mix and the
same number of unsteered requests, now one first and now the other, so that drift of the machine's speed affects both.
Invalid requests come on top of the mix. The figure to quote is the median over the rounds of the ratio of throughputs,
in generated tokens per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from batch_jobs.demo_model import demo_model_path
from benchmarks.harness import record
from benchmarks.harness.rounds import figures, interval
from benchmarks.server.api_server import is_healthy, running
from vllm_steer import Direction, save_directions

LAYER = 16
INVALID: tuple[dict[str, Any], ...] = (
    {"steering": [{"direction": "nobody", "alpha": 1.0}]},
    {"steering": [{"direction": "noise", "alpha": 1e9}]},
    {"steering": [{"direction": "noise", "alpha": 1.0, "layer": 3}]},
    {"readout": {"layers": []}},
    {"steering": "noise"},
)


@dataclass(frozen=True)
class Answer:
    """The reply to one request; `text` is None unless the status is 200."""

    status: int
    text: str | None


def main() -> None:
    """Run both servers, print the figures, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="in all mixes together")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    arguments = parser.parse_args()

    model = demo_model_path()
    mixed = mixture(arguments.requests, arguments.tokens)
    plain = [request for request in mixed if unsteered(request)]
    with tempfile.TemporaryDirectory(prefix="bench-server-") as folder:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        noise = np.random.default_rng(0).standard_normal(config["hidden_size"])
        directions = Path(folder) / "noise.safetensors"
        save_directions(directions, [Direction("noise", LAYER, noise).normalised()])
        with running(command(model, None), Path(folder) / "stock.log", VLLM_PLUGINS="") as stock:
            expected = asyncio.run(send(stock.url, plain, arguments.clients))
        settings = {"layers": [LAYER], "directions": [str(directions)]}
        with running(command(model, settings), Path(folder) / "steered.log", VLLM_PLUGINS="vllm_steer") as server:
            asyncio.run(send(server.url, mixed[: arguments.clients], arguments.clients))  # warm
            parts = split(mixed, arguments.rounds)
            rounds = [measure(server.url, part, arguments, number % 2 == 0) for number, part in enumerate(parts)]
            alive = is_healthy(server.url)
    answers = [answer for one in rounds for answer in one["answers"]]
    replies = [answer for answer, request in zip(answers, mixed, strict=True) if unsteered(request)]
    mixed_rounds = [{"mixed": one["mix"], "unsteered": one["unsteered"]} for one in rounds]
    figure = figures(mixed_rounds, "unsteered")["mixed"]
    measured = {
        "mixed": asdict(figure),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "server_errors": sum(answer.status >= 500 for answer in answers),
        "unsteered_equal_to_stock": sum(a.text == b.text for a, b in zip(replies, expected, strict=True)),
        "unsteered": len(replies),
        "alive_after": alive,
        "tokens_per_second_mix": statistics.median(one["mix"] for one in rounds),
        "tokens_per_second_unsteered": statistics.median(one["unsteered"] for one in rounds),
    }
    for name, value in measured.items():
        if name != "mixed":
            print(f"{name:<28} {value}")
    low, high = interval(figure.ratios)
    print(f"mixed against unsteered      {figure.ratio:.3f} ({low:.3f} - {high:.3f})")
    if arguments.out is not None:
        about = {name: getattr(arguments, name) for name in ("requests", "clients", "rounds", "tokens")}
        record.write(arguments.out, {"figures": measured}, model=model.name, **about)


def mixture(count: int, tokens: int) -> list[dict[str, Any]]:
    """`count` requests: 45 % unsteered, 30 % steered each with its own α, 15 % steered and read, 10 % invalid."""
    draw = random.Random(0)
    requests = []
    for index in range(count):
        body: dict[str, Any] = {
            "model": "bench",
            "prompt": f"Letter number {index}: my neighbour asked me for help and",
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        kind = draw.random()
        if kind < 0.45:
            body["steering"] = [{"direction": "noise", "alpha": draw.uniform(-20, 20)}]
            if kind < 0.15:
                body["readout"] = {"layers": [LAYER], "span": "all", "project": ["noise"]}
        elif kind < 0.55:
            body |= draw.choice(INVALID)
        requests.append(body)
    return requests


def unsteered(request: dict[str, Any]) -> bool:
    """Whether the request has neither steering nor a readout."""
    return "steering" not in request and "readout" not in request


def split(requests: Sequence[dict[str, Any]], parts: int) -> list[Sequence[dict[str, Any]]]:
    """Cut the requests into at most `parts` parts of equal size; the last may be smaller."""
    size = -(-len(requests) // parts)
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def measure(
    url: str, mixed: Sequence[dict[str, Any]], arguments: argparse.Namespace, is_mix_first: bool
) -> dict[str, Any]:
    """Run one round: the mix and, before or after it, its valid requests without steering and readouts."""
    bare = [
        {key: value for key, value in one.items() if key not in ("steering", "readout")}
        for one in mixed
        if not any(one.get(key) == invalid[key] for invalid in INVALID for key in invalid)
    ]
    answers: list[Answer] = []
    seconds = {}
    for name, bodies in (("mix", mixed), ("unsteered", bare))[:: 1 if is_mix_first else -1]:
        began = time.perf_counter()
        got = asyncio.run(send(url, bodies, arguments.clients))
        seconds[name] = time.perf_counter() - began
        answers = got if name == "mix" else answers
    assert sum(answer.status == 200 for answer in answers) == len(bare)
    tokens = len(bare) * arguments.tokens
    rates = {name: tokens / taken for name, taken in seconds.items()}
    print(f"mix {rates['mix']:.0f} tokens/s, unsteered {rates['unsteered']:.0f}", flush=True)
    return {"answers": answers, **rates}


async def send(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answer]:
    """Send all bodies, `clients` at a time; returns the answers in their order."""
    gate = asyncio.Semaphore(clients)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(body: dict[str, Any]) -> Answer:
            async with gate:
                reply = await client.post("/v1/completions", json=body)
            text = reply.json()["choices"][0]["text"] if reply.status_code == 200 else None
            return Answer(reply.status_code, text)

        return list(await asyncio.gather(*map(one, bodies)))


def command(model: Path, settings: dict[str, Any] | None) -> list[str]:
    """Arguments of vLLM's own server of the model as "bench", with the plugin configured if `settings` are given."""
    arguments = [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        "bench",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--kv-cache-memory-bytes",
        str(1 << 30),
        "--disable-uvicorn-access-log",
    ]
    if settings is None:
        return arguments
    return [*arguments, "--additional-config", json.dumps({"vllm_steer": settings})]


if __name__ == "__main__":
    main()
