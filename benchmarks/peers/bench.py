"""Other projects that steer inside vLLM: which of them install beside this vLLM, which run, and how fast.

    python -m benchmarks.peers.bench [--rounds 9] [--out FILE]

Each peer is tried in three steps. Can pip resolve it together with the installed vLLM (a dry run that changes nothing)?
Can it be imported from its own folder, installed without its dependencies? If so, the same requests run on plain vLLM,
on the peer and on vllm-steer, each in its own process, started as its documentation says. The three engines take turns,
step by step. A peer that gives the tokens of plain vLLM has not steered and is reported as such. Needs a package
registry; without one every peer's line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from benchmarks.harness.line_process import LineProcess, ProcessDied, side_by_side
from benchmarks.harness.rounds import Round, figures
from vllm_steer.engine.vllm_versions import vllm_version

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1")
PIP_SECONDS = 300
MAX_CHARACTERS = 300
OURS, PLAIN = "vllm-steer", "plain"


class NotSteered(Exception):
    """Requests that should have been steered were not."""


@dataclass(frozen=True)
class Peer:
    """A project that steers inside vLLM.

    Attributes:
        name: name of its distribution, or of the project if it has none.
        requirement: the requirement for pip; None if pip cannot install it.
        module: module to import as a test.
        needs: other packages that it needs and this project's environment may lack.
        plugin: its name among vLLM's plugins; None if it is no plugin.
        remark: a note for the record, such as why it cannot be tried.
    """

    name: str
    requirement: str | None
    module: str = ""
    needs: tuple[str, ...] = ()
    plugin: str | None = None
    remark: str = ""


PEERS = (
    Peer("vllm-lens", "vllm-lens==1.3.0", "vllm_lens._worker_ext", ("zstandard",), "activations"),
    Peer("hotwire-vllm", "hotwire-vllm==0.1.2", "hotwire._patch", (), "hotwire"),
    Peer(
        "nnsight",
        "nnsight[vllm]==0.8.1",
        "nnsight.modeling.vllm",
        ("zstandard", "websocket-client"),
        remark="traces Python code through the model and takes no steering with a request: there is no same work",
    ),
    Peer("vLLM-Hook", "git+https://github.com/IBM/vLLM-Hook#subdirectory=vllm_hook_plugins"),
    Peer("EasySteer", None, remark="a fork of vLLM: it takes vLLM's place"),
    Peer("RhizoNymph", None, remark="a fork of vLLM: it takes vLLM's place"),
)


@dataclass(frozen=True)
class Outcome:
    """The result of trying a peer.

    Attributes:
        resolves, imports, runs: "yes", or why not; "" if it did not get that far.
        figures: tokens/s and ratios to plain vLLM of plain, peer and vllm-steer; None if it did not run.
    """

    peer: str
    requirement: str | None
    remark: str
    resolves: str = ""
    imports: str = ""
    runs: str = ""
    figures: dict[str, Any] | None = None


def main() -> None:
    """Try all peers, print the outcomes, and write the record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="where to write the record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        outcomes = [tried(peer, Path(folder, peer.name), arguments.rounds) for peer in PEERS]
    for outcome in outcomes:
        print(f"\n{outcome.peer}: {outcome.requirement or 'not a package'}. {outcome.remark}")
        for question in ("resolves", "imports", "runs"):
            if answer := getattr(outcome, question):
                print(f"    {question:10} {answer}")
        for way, figure in (outcome.figures or {}).items():
            print(f"    {way:14} {figure['median']:8.1f} tok/s   to plain {figure['ratio']:.3f}")
    if arguments.out:
        record.write(arguments.out, {"peers": [asdict(outcome) for outcome in outcomes]})


def tried(peer: Peer, folder: Path, num_rounds: int) -> Outcome:
    """Try a peer step by step until one fails; packages and logs stay in `folder`."""
    outcome = Outcome(peer.name, peer.requirement, peer.remark)
    if peer.requirement is None:
        return outcome
    folder.mkdir()
    # The CPU build has another distribution name, so peers that need vLLM are bound to the same release of `vllm`.
    constraints = folder / "constraints.txt"
    constraints.write_text(f"vllm=={vllm_version()}\n", encoding="utf-8")
    outcome = replace(outcome, resolves=resolved(peer.requirement, constraints))
    site = folder / "site"
    # Install it in any case: its requirements for Python and vLLM may be stricter than necessary.
    unpacked = answer_of(
        *PIP,
        "install",
        "--quiet",
        "--no-deps",
        "--ignore-requires-python",
        "--target",
        str(site),
        peer.requirement,
        *peer.needs,
    )
    if unpacked != "yes":
        return replace(outcome, imports=unpacked)
    environment = {
        "PYTHONPATH": str(site),
        "HOTWIRE_VECTORS": str(folder / "vector.pt"),
        "HOTWIRE_SLOTS": "256",  # one per α
    }
    outcome = replace(outcome, imports=answer_of(sys.executable, "-c", f"import {peer.module}", **environment))
    if outcome.imports != "yes" or peer.plugin is None:
        return outcome
    try:
        measured = compared(peer, {**environment, "VLLM_PLUGINS": peer.plugin}, folder, num_rounds)
    except (ProcessDied, NotSteered) as error:
        return replace(outcome, runs=last_error(str(error)))
    return replace(outcome, runs="yes", figures=measured)


def resolved(requirement: str, constraints: Path) -> str:
    """The answer of a pip dry run; if it refuses this Python version, also the answer without that check."""
    command = (*PIP, "install", "--dry-run", "--constraint", str(constraints), requirement)
    answer = answer_of(*command)
    if "Requires-Python" in answer:
        answer += f" Python aside: {answer_of(*command, '--ignore-requires-python')}"
    return answer


def compared(peer: Peer, environment: Mapping[str, str], folder: Path, num_rounds: int) -> dict[str, Any]:
    """Figures of the tokens per second of plain vLLM, the peer and vllm-steer, measured in turn.

    Raises:
        ProcessDied: an engine did not start, or ended early.
        NotSteered: the peer or vllm-steer gave the tokens of plain vLLM.
    """
    engines: dict[str, LineProcess] = {}
    try:
        # The peer first: if it does not start, the others need not start.
        for kind, its in (
            (peer.name, environment),
            (PLAIN, {"VLLM_PLUGINS": ""}),
            (OURS, {"VLLM_PLUGINS": "vllm_steer"}),
        ):
            engines[kind] = LineProcess("benchmarks.peers.engine", kind, its, folder / f"{kind}.log")
            engines[kind].wait()
        rounds = [one_round(engines, number % 2 == 1) for number in range(num_rounds)]
    finally:
        for engine in engines.values():
            engine.close()
    return {kind: asdict(figure) for kind, figure in figures(rounds, PLAIN).items()}


def one_round(engines: Mapping[str, LineProcess], is_reversed: bool) -> Round:
    """Tokens per second of each engine, with all engines taking turns.

    Raises:
        NotSteered: one of them gave the tokens of plain vLLM.
    """
    kinds = [*reversed([*engines])] if is_reversed else [*engines]
    answers = {kind: json.loads(one) for kind, one in side_by_side({k: engines[k].turns() for k in kinds}).items()}
    for kind, answer in answers.items():
        if kind != PLAIN and answer["tokens"] == answers[PLAIN]["tokens"]:
            raise NotSteered(f"the requests of {kind} got the tokens of unsteered ones")
    return {kind: float(answer["rate"]) for kind, answer in answers.items()}


def answer_of(*command: str, **environment: str) -> str:
    """Run a command and return "yes", or its last error."""
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PIP_SECONDS, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PIP_SECONDS} s"
    return "yes" if ran.returncode == 0 else last_error(ran.stdout + ran.stderr)


def last_error(output: str) -> str:
    """The line of pip's or Python's output that names the fault, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # Lines of git and pip, the more specific first; Python's own error is the last line.
    for mark in ("fatal: ", " depends on ", "ERROR: "):
        for line in lines:
            if mark in line:
                return line.removeprefix(mark)[:MAX_CHARACTERS]
    return lines[-1][:MAX_CHARACTERS] if lines else "no output"


if __name__ == "__main__":
    main()
