#!/usr/bin/env bash
# steering-vectors 0.12.2: `min_token_index=5` with `model.generate` steers the prompt from its sixth token on and no
# generated token; `slice(0, 2)` steers all generated tokens.
#
# "The minimum token index to apply the patch to" is counted within each forward pass. Beside a key-value cache, which
# generate uses by default, every generated token is a pass of one token, whose index is 0. Without a cache the same
# call steers the answer too, so the text depends on a setting that is only meant to save time. A list of tokens, or a
# mask, ends generate with an error at the first generated token. And `apply(model, token_indices=...)` alone always
# fails: its own default min_token_index=0 counts as a second choice.
# Seen, of a prompt of 8 tokens, and 4 passes after the first one:
#     min_token_index=5, cache: 3 tokens of the prompt, 0 of the answer
#     min_token_index=5, no cache: 3 tokens of the prompt, 4 of the answer
#     token_indices=slice(0, 2), cache: 2 tokens of the prompt, 4 of the answer
#     token_indices=[2], cache: IndexError
#     token_indices alone: UnboundLocalError
set -euo pipefail
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.3 steering-vectors==0.12.2
HF_HUB_OFFLINE=1 "$WORK/venv/bin/python" - 2>"$WORK/log" <<'PY' || { tail -20 "$WORK/log"; exit 1; }
import sys

import torch
from steering_vectors import SteeringVector
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
vector = SteeringVector({1: torch.ones(32)})
prompt = torch.arange(3, 11)[None]


def steered(cache, **chosen):
    """Positions whose stream the vector changed, of the prompt and of the answer."""
    before, found = [], set()

    def keep(module, args, output):
        before.append((output[0] if isinstance(output, tuple) else output).clone())

    def compare(module, args, output):
        after = output[0] if isinstance(output, tuple) else output
        changed = (after != before[-1]).any(-1)[0].nonzero()[:, 0].tolist()
        start = 0 if not cache else (0 if len(before) == 1 else prompt.shape[1] + len(before) - 2)
        found.update(start + one for one in changed)

    block = model.model.layers[1]
    hooks = [block.register_forward_hook(keep)]
    try:
        with vector.apply(model, multiplier=5.0, **chosen):
            hooks.append(block.register_forward_hook(compare))
            model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
    finally:
        for hook in hooks:
            hook.remove()
    length = prompt.shape[1]
    return sum(one < length for one in found), sum(one >= length for one in found)


ways = {
    "min_token_index=5, cache": (True, {"min_token_index": 5}),
    "min_token_index=5, no cache": (False, {"min_token_index": 5}),
    "token_indices=slice(0, 2), cache": (True, {"min_token_index": None, "token_indices": slice(0, 2)}),
    "token_indices=[2], cache": (True, {"min_token_index": None, "token_indices": [2]}),
}
seen = []
for label, (cache, chosen) in ways.items():
    try:
        seen.append(steered(cache, **chosen))
        print(f"{label}: {seen[-1][0]} tokens of the prompt, {seen[-1][1]} of the answer")
    except IndexError:
        seen.append(IndexError)
        print(f"{label}: IndexError")
try:
    steered(True, token_indices=slice(0, 2))
except UnboundLocalError:  # in the clean-up after an AssertionError
    seen.append(UnboundLocalError)
    print("token_indices alone: UnboundLocalError")
sys.exit(0 if seen == [(3, 0), (3, 4), (2, 4), IndexError, UnboundLocalError] else "CHANGED")
PY
echo "as described: a range of steering-vectors 0.12.2 is counted anew in each forward pass"
