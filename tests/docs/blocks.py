"""The code blocks of README and ``docs/``, and how they are run.

A block is run, or a comment right before it says why it is not: ``<!-- not run: reason -->``. The blocks of a page are
run in their order; Python's share one namespace.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GENERATED = ("docs/conformance.md", "docs/patches.md")
RUNNABLE = ("python", "bash")
SERVER_URL = "http://127.0.0.1:8000"
_FENCE = re.compile(r"\s*```(\w*)")
_MARKER = re.compile(r"<!-- not run: (\S.*) -->")
# The commands of this project's environment, whatever is on the PATH.
_PRELUDE = """
python() { "$PYTHON" "$@"; }
vllm-steer() { "$PYTHON" -c 'from batch_jobs.cli.command import main; main()' "$@"; }
"""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file, from the repository's root.
        line: number of the first line within the fence.
        language: as the fence names it.
        source: the text between the fences.
        reason: why it is not run; None where it is to be run.
    """

    page: str
    line: int
    language: str
    source: str
    reason: str | None

    @property
    def place(self) -> str:
        """Page and line, as in an error message."""
        return f"{self.page}:{self.line}"

    @property
    def asks_server(self) -> bool:
        """Whether the block names the pages' server."""
        return SERVER_URL in self.source

    @property
    def needs_engine(self) -> bool:
        """Whether the block makes an engine."""
        return "LLM(" in self.source


def pages() -> list[str]:
    """README and all pages that are written by hand, from the repository's root."""
    found = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page not in GENERATED]


def blocks_in(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page, whose file holds ``text``."""
    found: list[Block] = []
    opened: tuple[int, str, str | None] | None = None
    before, inside = "", []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is not None and line.strip() == "```":
            found.append(Block(page, opened[0], opened[1], "\n".join(inside) + "\n", opened[2]))
            opened = None
        elif opened is not None:
            inside.append(line)
        elif fence is not None:
            marker = _MARKER.fullmatch(before.strip())
            opened, inside = (number + 1, fence[1], None if marker is None else marker[1]), []
        before = line
    assert opened is None, f"{page}:{opened}: the fence is not closed"
    return found


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in pages() for block in blocks_in(page, (ROOT / page).read_text(encoding="utf-8"))]


def to_run() -> list[Block]:
    """The blocks that are run somewhere."""
    return [block for block in all_blocks() if block.language in RUNNABLE and block.reason is None]


def is_server_page(page: str) -> bool:
    """Whether the blocks of a page talk to a server; README's are split instead."""
    return page != "README.md" and any(block.asks_server for block in to_run() if block.page == page)


def asks_server(block: Block) -> bool:
    """Whether a block is run against a server and not in an engine's process."""
    return block.asks_server if block.page == "README.md" else is_server_page(block.page)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Run a Python block in this process; tracebacks show its page and line."""
    source = "\n" * (block.line - 1) + block.source
    exec(compile(source, str(ROOT / block.page), "exec"), namespace)


def run_bash(block: Block, folder: Path, environment: dict[str, str] | None = None, url: str = SERVER_URL) -> str:
    """Run a shell block in ``folder``; returns what it printed. ``url`` replaces the URL of the pages' server."""
    return _finished(
        ["bash", "-euo", "pipefail", "-c", _PRELUDE + block.source.replace(SERVER_URL, url)],
        folder,
        environment or {},
        block.place,
    )


def run_script(blocks: Iterable[Block], folder: Path, url: str) -> str:
    """Run the Python blocks of a page as one script in a process of its own; returns what it printed."""
    chosen = list(blocks)
    script = folder / "page.py"
    script.write_text("\n".join(block.source for block in chosen).replace(SERVER_URL, url), encoding="utf-8")
    return _finished([sys.executable, str(script)], folder, {}, chosen[0].page)


def _finished(command: list[str], folder: Path, environment: dict[str, str], place: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{place}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
