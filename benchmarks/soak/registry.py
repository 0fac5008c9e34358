"""A soak test of a server's registry: directions are added, replaced and deleted in a loop while steered requests run.

    python -m benchmarks.soak.registry [--cycles 5000] [--clients 4] [--out FILE]

A cycle registers a new name, replaces its vector under If-Match and deletes it. Every few cycles another name, the
standing one, switches between two contents, A and B. Meanwhile clients ask for completions steered by it and for
unsteered ones, and compare each with the reply to the same request before the soak. Memory, files and bank slots at the
end must be what they were near the beginning. The exit code is 1 if a check fails.

The model is random: few layers and words make a cycle fast, and wide vectors make a leaked one large.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import record
from benchmarks.server.api_server import running

HIDDEN_SIZE, NUM_LAYERS, WORDS = 4096, 3, 512
LAYER = 1  # not the last layer, so that the KV of the layer above depends on the content
ALPHA = 400.0  # about the norm of the residual stream there
PROMPTS, PROMPT_WORDS, BLOCK_TOKENS = 8, 72, 32  # two full blocks of each prompt can come from the prefix cache
MAX_TOKENS = 8
SLOTS = 32  # few, so that a leak of one per cycle soon leaves none
ROUTE = "/v1/steering/directions/"
STANDING, UNSTEERED = "standing", "unsteered"
CONTENTS = ("A", "B")
COUNTED = ("steered", "one_content_possible", "unsteered", "stale", "foreign")
REPLACE_EVERY = 5
SAMPLE_EVERY = 50
WARM_SHARE = 0.2
# A leaked copy of every vector sent would make 34 MiB in 1,000 cycles and 138 MiB in the 4,000 that the default
# measures. Allocators fluctuate by a few MiB.
GROWTH_LIMIT_MIB = 30.0
VECTOR_BYTES = 4 * HIDDEN_SIZE
RELEASE_SECONDS = 10.0
ADMIN_VARIABLE, ADMIN_KEY = "VLLM_STEER_ADMIN_KEY", "soak"


@dataclass(frozen=True)
class Sample:
    """The state between two cycles.

    Attributes:
        cycle: number of cycles done.
        rss_mib: resident memory of all server processes.
        files, bytes: number and total size of the files in the registry's folder.
    """

    cycle: int
    rss_mib: float
    files: int
    bytes: int


@dataclass
class Period:
    """Time in which requests can be admitted with one content: from its PUT to the reply to the next PUT.

    Times are those of ``perf_counter``.
    """

    content: str
    since: float
    until: float = math.inf


class Standing:
    """The standing name's contents over time."""

    def __init__(self, content: str) -> None:
        self._periods = deque([Period(content, -math.inf)], maxlen=100)  # far more than can pass during one request

    @property
    def content(self) -> str:
        """The latest content."""
        return self._periods[-1].content

    @contextmanager
    def changing(self, content: str) -> Iterator[None]:
        """Context manager around the PUT of a content, which may take effect at any moment inside."""
        before = self._periods[-1]
        self._periods.append(Period(content, time.perf_counter()))
        yield
        before.until = time.perf_counter()

    def possible(self, sent: float, received: float) -> set[str]:
        """The contents with which a request sent and answered at these times may have been admitted."""
        return {one.content for one in self._periods if one.since <= received and sent <= one.until}


class Soak:
    """One soak test of a running server.

    Args:
        url: address of the server.
        server: its main process.
        registry: folder of its registry.
    """

    def __init__(self, url: str, server: psutil.Process, registry: Path) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=120, headers={"X-Admin-Key": ADMIN_KEY})
        self.server = server
        self.registry = registry
        self.samples: list[Sample] = []
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self._cycle = 0
        self._draw = np.random.default_rng(0)
        self._vectors = {name: self._vector() / math.sqrt(HIDDEN_SIZE) for name in CONTENTS}  # about unit
        words = random.Random(0)
        self._prompts = [" ".join(f"w{words.randrange(WORDS)}" for _ in range(PROMPT_WORDS)) for _ in range(PROMPTS)]
        self._expected: dict[tuple[str, str], str] = {}  # (content or UNSTEERED, prompt) -> reply
        self._stop = asyncio.Event()

    async def run(self, cycles: int, clients: int) -> dict[str, Any]:
        """Run the soak and return its figures; ends early if a request is refused or not answered."""
        async with self.client:
            await self._learn()
            began = time.perf_counter()
            problems = await self._soak(cycles, clients)
            seconds = time.perf_counter() - began
            bank_after = None if problems else await self._bank_after()
        return {
            "problems": problems,
            "cycles": self._cycle,
            "seconds": seconds,
            "completions_a_second": (self.counts["steered"] + self.counts["unsteered"]) / seconds,
            **{what: self.counts[what] for what in COUNTED},
            "statuses": dict(sorted(self.statuses.items())),
            **growth(self.samples),
            "bank_after": bank_after,
        }

    async def _soak(self, cycles: int, clients: int) -> list[str]:
        """Change directions and ask for completions at once; returns the errors that ended it early."""
        standing = Standing(CONTENTS[-1])
        problems: list[str] = []
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(clients):
                    group.create_task(self._keep_asking(standing, number))
                await self._change(standing, cycles)
                self._stop.set()
        except* httpx.HTTPError as errors:
            problems = [repr(error) for error in errors.exceptions]
        return problems

    async def _learn(self) -> None:
        """Record the reply to every request under each content, with nothing else running and a cold prefix cache."""
        for content in CONTENTS:
            await self._put(STANDING, self._vectors[content])
            for prompt in self._prompts:
                self._expected[content, prompt] = await self._ask(prompt, steered=True, cache_salt=content)
        for prompt in self._prompts:
            self._expected[UNSTEERED, prompt] = await self._ask(prompt, steered=False, cache_salt=UNSTEERED)
            replies = {self._expected[content, prompt] for content in (*CONTENTS, UNSTEERED)}
            if len(replies) < 3:
                sys.exit(f"two contents give the same reply to {prompt!r}, so this would test nothing; change ALPHA.")

    async def _change(self, standing: Standing, cycles: int) -> None:
        tag = await self._put(STANDING, self._vectors[standing.content])
        for cycle in range(1, cycles + 1):
            name = f"soak/{cycle}"
            first = await self._put(name, self._vector())
            await self._put(name, self._vector(), **{"If-Match": first})
            await self._send("DELETE", ROUTE + quote(name, safe=""))
            if cycle % REPLACE_EVERY == 0:
                content = CONTENTS[1 - CONTENTS.index(standing.content)]
                with standing.changing(content):
                    tag = await self._put(STANDING, self._vectors[content], **{"If-Match": tag})
            self._cycle = cycle
            if cycle % min(SAMPLE_EVERY, max(1, cycles // 20)) == 0:
                self._sample()

    async def _keep_asking(self, standing: Standing, number: int) -> None:
        draw = random.Random(number)
        while not self._stop.is_set():
            prompt, steered = draw.choice(self._prompts), draw.random() < 0.7
            sent = time.perf_counter()
            text = await self._ask(prompt, steered=steered)
            possible = standing.possible(sent, time.perf_counter()) if steered else {UNSTEERED}
            self.counts["steered" if steered else "unsteered"] += 1
            self.counts["one_content_possible"] += steered and len(possible) == 1
            said = [content for content in (*CONTENTS, UNSTEERED) if self._expected[content, prompt] == text]
            if not said:
                self.counts["foreign"] += 1
                print(f"to {prompt!r} ({possible}) came {text!r}, which is no content's", flush=True)
            elif said[0] not in possible:
                self.counts["stale"] += 1
                print(f"to {prompt!r} came the reply of {said[0]}; possible: {possible}", flush=True)

    def _sample(self) -> None:
        processes = [self.server, *self.server.children(recursive=True)]
        rss = sum(process.memory_info().rss for process in processes) / 2**20
        files = [path.stat().st_size for path in self.registry.rglob("*") if path.is_file()]
        self.samples.append(Sample(self._cycle, round(rss, 2), len(files), sum(files)))
        print(self.samples[-1], flush=True)

    async def _bank_after(self) -> dict[str, int]:
        """Use of the bank without directions; waits for requests, which free their slots just after their reply."""
        await self._send("DELETE", ROUTE + STANDING)
        deadline = time.perf_counter() + RELEASE_SECONDS
        while True:
            bank: dict[str, int] = (await self._send("GET", "/v1/steering")).json()["bank"]
            if not bank["held"] or time.perf_counter() > deadline:
                return bank
            await asyncio.sleep(0.1)

    async def _ask(self, prompt: str, *, steered: bool, **rest: str) -> str:
        body: dict[str, Any] = {"model": "soak", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, **rest}
        if steered:
            body["steering"] = [{"direction": STANDING, "alpha": ALPHA}]
        reply = await self._send("POST", "/v1/completions", json={**body, "ignore_eos": True})
        return str(reply.json()["choices"][0]["text"])

    def _vector(self) -> npt.NDArray[np.float32]:
        return self._draw.standard_normal(HIDDEN_SIZE, dtype=np.float32)

    async def _put(self, name: str, vector: npt.NDArray[np.float32], **headers: str) -> str:
        """Register or replace a direction; returns its ETag."""
        body = vector.astype("<f4").tobytes()
        reply = await self._send("PUT", f"{ROUTE}{quote(name, safe='')}?layer={LAYER}", content=body, headers=headers)
        return str(reply.headers["ETag"])

    async def _send(self, method: str, path: str, **rest: Any) -> httpx.Response:
        """Send a request, count its status, and return the reply.

        Raises:
            httpx.HTTPError: no answer, or a refusal; every request sent here is valid.
        """
        reply = await self.client.request(method, path, **rest)
        self.statuses[f"{method} {reply.status_code}"] += 1
        if reply.is_error:
            print(f"{method} {path}: {reply.status_code} {reply.text}", flush=True)
        return reply.raise_for_status()


def main() -> None:
    """Run the soak test against a server of its own, and report; the exit code is 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.cycles < 20:
        parser.error(f"--cycles is {arguments.cycles}; fitting a line to the memory takes 20 or more")
    with tempfile.TemporaryDirectory(prefix="soak-registry-") as folder:
        save_model(Path(folder, "model"))
        environment = {"VLLM_PLUGINS": "vllm_steer", ADMIN_VARIABLE: ADMIN_KEY}
        with running(command(Path(folder)), Path(folder, "server.log"), **environment) as server:
            soak = Soak(server.url, server.process, Path(folder, "registry"))
            figures = asyncio.run(soak.run(arguments.cycles, arguments.clients))
        checks = check(figures, arguments.cycles)
        if not all(checks.values()):
            print(Path(folder, "server.log").read_text(errors="replace")[-4000:])
    report(figures, checks, soak.samples, arguments)
    sys.exit(0 if all(checks.values()) else 1)


def save_model(folder: Path) -> None:
    """Write a random Llama with the words w0, w1, ... as vocabulary; the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=WORDS,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def command(folder: Path) -> list[str]:
    """Arguments of vLLM's own server of the model in `folder` as "soak", with its registry in the same folder."""
    settings = {"layers": [LAYER], "max_directions": SLOTS, "registry_dir": str(folder / "registry")}
    return [
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "model"),
        "--served-model-name",
        "soak",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--block-size",
        str(BLOCK_TOKENS),
        # Cache memory becomes resident when a block is first used; this much is used before measuring begins.
        "--kv-cache-memory-bytes",
        str(16 << 20),
        "--disable-uvicorn-access-log",
        "--additional-config",
        json.dumps({"vllm_steer": settings}),
    ]


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """Figures of the samples after warm-up and the least-squares line through their memory; empty for too few."""
    kept = [one for one in samples if one.cycle >= WARM_SHARE * samples[-1].cycle]
    if len(kept) < 2:
        return {}
    slope = float(np.polyfit([one.cycle for one in kept], [one.rss_mib for one in kept], 1)[0])
    cycles = kept[-1].cycle - kept[0].cycle
    return {
        "rss_mib": [kept[0].rss_mib, kept[-1].rss_mib],
        "slope_mib_a_1000_cycles": 1000 * slope,
        "growth_mib": slope * cycles,
        "one_copy_of_every_vector_mib": (2 + 1 / REPLACE_EVERY) * VECTOR_BYTES * cycles / 2**20,
        "files": [min(one.files for one in kept), max(one.files for one in kept)],
        "bytes": [min(one.bytes for one in kept), max(one.bytes for one in kept)],
    }


def check(figures: dict[str, Any], cycles: int) -> dict[str, bool]:
    """Check -> whether it passed."""
    done = figures["cycles"] == cycles and not figures["problems"]
    return {
        "every cycle done, no request refused": done,
        "no reply stale or foreign": figures["stale"] == figures["foreign"] == 0 < figures["one_content_possible"],
        "memory flat": done and figures["growth_mib"] < GROWTH_LIMIT_MIB,
        "files flat": done and figures["files"][0] == figures["files"][1],
        # The index file holds slot numbers of one or two digits.
        "bytes flat": done and figures["bytes"][1] - figures["bytes"][0] < VECTOR_BYTES,
        "bank free": figures["bank_after"] == {"registered": 0, "held": 0, "free": SLOTS},
    }


def report(
    figures: dict[str, Any], checks: dict[str, bool], samples: Sequence[Sample], arguments: argparse.Namespace
) -> None:
    """Print figures and checks, and write the record if asked to."""
    for name, value in (*figures.items(), *checks.items()):
        print(f"{name:<38} {value}")
    if arguments.out is not None:
        measured = {
            "growth_limit_mib": GROWTH_LIMIT_MIB,
            "checks": checks,
            "figures": figures,
            "samples": {name: [getattr(one, name) for one in samples] for name in Sample.__annotations__},
        }
        record.write(
            arguments.out,
            measured,
            model=f"random llama, {NUM_LAYERS} layers, hidden size {HIDDEN_SIZE}, float32",
            cycles=arguments.cycles,
            clients=arguments.clients,
            slots=SLOTS,
        )


if __name__ == "__main__":
    main()
