#!/usr/bin/env bash
# inspect_ai 0.3.285, provider "vllm": a second server with the same model name is not asked while a model of the first
# is open.
#
# Who compares a plain with a steered server by two get_model("vllm/m", base_url=...) compares the first one with
# itself: the provider remembers a server by the model's name, not by its address. Seen, requests that arrived:
#     first server: 2
#     second server: 0
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check inspect_ai==0.3.285 openai==3.57.0
PYTHONPATH=$HERE/common "$WORK/venv/bin/python" - <<'EOF'
import asyncio
import sys

from inspect_ai.model import get_model
from stub_server import chat, serve

servers = [serve(chat) for _ in range(2)]


async def main():
    urls = [f"{url}/v1" for url, _ in servers]
    async with get_model("vllm/m", base_url=urls[0], api_key="none") as first:
        await first.generate("hello")
        async with get_model("vllm/m", base_url=urls[1], api_key="none") as second:
            await second.generate("hello")


asyncio.run(main())
counts = [len(arrived) for _, arrived in servers]
print(f"first server: {counts[0]}")
print(f"second server: {counts[1]}")
sys.exit(0 if counts == [2, 0] else "CHANGED")
EOF
echo "as described: inspect_ai 0.3.285 asks the first server for both"
