#!/usr/bin/env bash
# vLLM 0.32.0: when the API server's process is killed (SIGKILL, as by the kernel when memory runs out), its engine's
# processes stay, hold the model and the KV cache, and never end by themselves.
#
# On SIGTERM the server ends them. Without it nothing does: the engine waits for its next request, and its worker for
# the engine. Seen 60 s after the kill:
#     2 processes of the engine still run
source "$(dirname "$0")/common/vllm_server.sh"
install "$VLLM"
make_model
serve
curl -sf -H 'Content-Type: application/json' -d '{"model": "tiny", "prompt": "word2", "max_tokens": 2}' \
    "$URL/v1/completions" >/dev/null
before=$(engine_processes | wc -l)
[ "$before" -gt 0 ] || { echo "CHANGED: no process of the engine was found"; exit 1; }
kill -9 "$SERVER"
sleep 60
after=$(engine_processes | wc -l)
echo "$after processes of the engine still run"
[ "$after" -eq "$before" ] || { echo CHANGED; exit 1; }
echo "as described: the engine of $VLLM outlives a killed server"
