#!/usr/bin/env bash
# litellm 1.110.2, Router: the `extra_body` of a deployment is lost to each request that brings one of its own.
#
# A deployment whose litellm_params say extra_body={"steering": ...} answers a plain request steered, and a request with
# extra_body={"top_k": 5} unsteered, without a word: the request's dict takes the place of the deployment's, the two are
# not merged. The same field under litellm_params itself reaches the server in both cases. Seen, fields that arrived:
#     in extra_body, plain request:          steering
#     in extra_body, request with its own:   top_k
#     beside it, request with its own:       steering top_k
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check litellm==1.110.2
LITELLM_LOCAL_MODEL_COST_MAP=True PYTHONPATH=$HERE/common "$WORK/venv/bin/python" - <<'EOF'
import sys

from litellm import Router
from stub_server import chat, serve

url, arrived = serve(chat)
steering = {"steering": [{"direction": "kind", "alpha": 5}]}


def fields(deployment, **request):
    """The fields beside OpenAI's that one request to a Router of one deployment sends."""
    place = {"model": "hosted_vllm/m", "api_base": f"{url}/v1", "api_key": "none"}
    router = Router([{"model_name": "m", "litellm_params": {**place, **deployment}}])
    router.completion("m", [{"role": "user", "content": "hello"}], **request)
    return sorted(set(arrived[-1]) & {"steering", "top_k"})


seen = {
    "in extra_body, plain request": fields({"extra_body": steering}),
    "in extra_body, request with its own": fields({"extra_body": steering}, extra_body={"top_k": 5}),
    "beside it, request with its own": fields(steering, extra_body={"top_k": 5}),
}
for case, names in seen.items():
    print(f"{case}: {' '.join(names)}")
described = [["steering"], ["top_k"], ["steering", "top_k"]]
sys.exit(0 if list(seen.values()) == described else "CHANGED")
EOF
echo "as described: litellm 1.110.2 replaces a deployment's extra_body by the request's"
