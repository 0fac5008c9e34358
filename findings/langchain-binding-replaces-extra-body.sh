#!/usr/bin/env bash
# langchain-openai 1.7.4: a bound `extra_body` takes the place of the model's own, and a cache of bare texts does not know
# it.
#
# ChatOpenAI(extra_body={"steering": ...}).bind(extra_body={"readout": ...}) sends the readout and no steering: what was
# to be read steered is read plain, without a word. OpenAI (bare texts) with a cache answers a bound steering from the
# text that it was given without it, and sends nothing. Seen, fields that arrived:
#     model: steering
#     model with a bound readout: readout
#     requests for plain and bound steering with a cache: 1
set -euo pipefail
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check langchain-openai==1.7.4 langchain-core==1.8.3
"$WORK/venv/bin/python" - <<'EOF'
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from langchain_core.caches import InMemoryCache
from langchain_openai import ChatOpenAI, OpenAI

arrived = []


class Server(BaseHTTPRequestHandler):
    """Keeps the body of each request and answers it as a chat or as a bare text."""

    def do_POST(self):
        arrived.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"message": {"role": "assistant", "content": "yes"}, "text": "yes"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        kind = "chat.completion" if "messages" in arrived[-1] else "text_completion"
        choice = {"index": 0, "finish_reason": "stop", **message}
        reply = {"id": "1", "object": kind, "created": 1, "model": "m", "choices": [choice], "usage": usage}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
Thread(target=server.serve_forever, daemon=True).start()
place = {"model": "m", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key": "none"}
steering, readout = {"steering": [{"direction": "kind", "alpha": 5}]}, {"readout": {"span": "all"}}


def fields():
    """The fields of the last request that are not OpenAI's."""
    return sorted(set(arrived[-1]) & {"steering", "readout"})


model = ChatOpenAI(**place, extra_body=steering)
model.invoke("hello")
own = fields()
model.bind(extra_body=readout).invoke("hello")
bound = fields()
arrived.clear()
texts = OpenAI(**place, temperature=0, cache=InMemoryCache())
texts.invoke("hello")
texts.bind(extra_body=steering).invoke("hello")
print(f"model: {' '.join(own)}")
print(f"model with a bound readout: {' '.join(bound)}")
print(f"requests for plain and bound steering with a cache: {len(arrived)}")
sys.exit(0 if (own, bound, len(arrived)) == (["steering"], ["readout"], 1) else "CHANGED")
EOF
echo "as described: langchain-openai 1.7.4 does not merge a bound extra_body, and a cache of bare texts ignores it"
