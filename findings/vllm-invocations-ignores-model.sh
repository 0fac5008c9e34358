#!/usr/bin/env bash
# vLLM 0.32.0: POST /invocations answers whatever model the body names, also one that is not served.
#
# The route of SageMaker passes its body through model-hosting-container-standards 0.1.x, which puts the value of a
# header (null where there is none) where the body's `model` was. A client that picks a model, an adapter or another
# served name by `model` gets the base model, with status 200. Seen, one body sent to both routes:
#     /v1/completions 404
#     /invocations 200
source "$(dirname "$0")/common/vllm_server.sh"
install "$VLLM"
make_model
serve
body='{"model": "nobody", "prompt": "word2 word3", "max_tokens": 2}'
status() { curl -s -o "$WORK/reply" -w '%{http_code}' -H 'Content-Type: application/json' -d "$body" "$URL$1"; }
named=$(status /v1/completions)
invoked=$(status /invocations)
echo "/v1/completions $named"
echo "/invocations $invoked"
cat "$WORK/reply"
echo
[ "$named" = 404 ] && [ "$invoked" = 200 ] || { echo CHANGED; exit 1; }
echo "as described: /invocations of $VLLM does not read the body's model"
