"""Makes `vllm_steer/client/sync_client.py` from `async_client.py`: `python -m tests.client.sync_from_async`."""

from __future__ import annotations

import re
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[2] / "vllm_steer" / "client"
SOURCE, TARGET = CLIENT / "async_client.py", CLIENT / "sync_client.py"
_REPLACED = (
    (
        r"The asynchronous client, from which.*?`python -m [\w.]+`\.",
        "The synchronous client, made from `async_client.py`.",
    ),
    (
        r"Its methods are awaited.*?``await close\(\)``\.",
        "Close it, or use it as a context manager. Several threads may share it.",
    ),
    (r"AsyncSteerClient", "SteerClient"),
    (r"for piece in pieces\(event\):\s+yield piece", "yield from pieces(event)"),
    (r"async (def|for|with) ", r"\1 "),
    (r"\bawait ", ""),
    (r"\((self\._send\([^\n]*?\))\)\.", r"\1."),
    (r"Async(Iterator|Client|BaseTransport)", r"\1"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r"\.a(close|read|iter_bytes)\(", r".\1("),
)


def sync_source() -> str:
    """The text of the synchronous client."""
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL if ".*?" in pattern else 0)
    return text


if __name__ == "__main__":
    TARGET.write_text(sync_source(), encoding="utf-8")
