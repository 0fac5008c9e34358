#!/usr/bin/env bash
# inspect_ai 0.3.285, provider "vllm": a second server with the same model name is not asked while a model of the first
# is open.
#
# Who compares a plain with a steered server by two get_model("vllm/m", base_url=...) compares the first one with
# itself: the provider remembers a server by the model's name, not by its address. Seen, requests that arrived:
#     first server: 2
#     second server: 0
set -euo pipefail
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check inspect_ai==0.3.285 openai==3.57.0
"$WORK/venv/bin/python" - <<'EOF'
import asyncio
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from inspect_ai.model import get_model

arrived = []


class Server(BaseHTTPRequestHandler):
    """Notes its port for each request, and answers as a chat server does."""

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "me"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        arrived.append(self.server.server_port)
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.answer(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        )

    def answer(self, reply):
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


servers = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
for server in servers:
    Thread(target=server.serve_forever, daemon=True).start()


async def main():
    urls = [f"http://127.0.0.1:{server.server_port}/v1" for server in servers]
    async with get_model("vllm/m", base_url=urls[0], api_key="none") as first:
        await first.generate("hello")
        async with get_model("vllm/m", base_url=urls[1], api_key="none") as second:
            await second.generate("hello")


asyncio.run(main())
counts = [arrived.count(server.server_port) for server in servers]
print(f"first server: {counts[0]}")
print(f"second server: {counts[1]}")
sys.exit(0 if counts == [2, 0] else "CHANGED")
EOF
echo "as described: inspect_ai 0.3.285 asks the first server for both"
