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
HERE=$(cd "$(dirname "$0")" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check langchain-openai==1.7.4 langchain-core==1.8.3
PYTHONPATH=$HERE/common "$WORK/venv/bin/python" - <<'EOF'
import sys

from langchain_core.caches import InMemoryCache
from langchain_openai import ChatOpenAI, OpenAI
from stub_server import chat, serve

url, arrived = serve(chat)
place = {"model": "m", "base_url": f"{url}/v1", "api_key": "none"}
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
