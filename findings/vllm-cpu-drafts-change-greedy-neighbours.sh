#!/usr/bin/env bash
# vLLM 0.32.0 on a CPU: with speculative decoding, a request with a temperature changes the tokens of greedy requests
# in its batch.
#
# Speculation is meant to leave greedy outputs as they are. Alone they are; beside sampled requests the drafts of all
# are verified at temperatures that no request asked for. Seen, of 8 greedy requests:
#     without speculation, beside sampled ones: 0 differ
#     with n-gram drafts, alone: 0 differ
#     with n-gram drafts, beside sampled ones: 8 differ
source "$(dirname "$0")/common/vllm_server.sh"
install "$VLLM"
make_model
cat >"$WORK/ask.py" <<'EOF'
import json
import sys

from vllm import LLM, SamplingParams

model, drafts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(
    model, dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=64 << 20,
    enable_prefix_caching=False, speculative_config=drafts,
)
prompts = [" ".join(f"word{first + step % 5}" for step in range(20)) for first in range(10, 90, 10)]
greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
sampled = SamplingParams(temperature=1, max_tokens=64, ignore_eos=True)


def tokens(outputs):
    return [list(one.outputs[0].token_ids) for one in outputs]


alone = tokens(llm.generate(prompts, greedy, use_tqdm=False))
beside = tokens(llm.generate(prompts + prompts, [greedy] * 8 + [sampled] * 8, use_tqdm=False))[:8]
json.dump([alone, beside], open(sys.argv[3], "w"))
EOF
ngram='{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}'
export VLLM_ENABLE_V1_MULTIPROCESSING=0
cd "$WORK"
"$PYTHON" ask.py "$WORK/model" null plain.json >log 2>&1 || { tail -30 log; exit 2; }
"$PYTHON" ask.py "$WORK/model" "$ngram" drafted.json >log 2>&1 || { tail -30 log; exit 2; }
"$PYTHON" - <<'EOF'
import json
import sys

plain, plain_beside = json.load(open("plain.json"))
alone, beside = json.load(open("drafted.json"))


def differ(other):
    return sum(one != two for one, two in zip(plain, other))


print(f"without speculation, beside sampled ones: {differ(plain_beside)} differ")
print(f"with n-gram drafts, alone: {differ(alone)} differ")
print(f"with n-gram drafts, beside sampled ones: {differ(beside)} differ")
sys.exit(0 if differ(plain_beside) == differ(alone) == 0 < differ(beside) else "CHANGED")
EOF
echo "as described: $VLLM verifies greedy drafts at other temperatures"
