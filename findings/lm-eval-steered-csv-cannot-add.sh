#!/usr/bin/env bash
# lm-eval 0.4.13, model `steered` with a CSV file: the action `add`, which is its default and that of its examples,
# always ends with an AssertionError; and of two features at one layer only the last is applied, without a word.
#
# The reader gives every row the autoencoder's decoder bias, and the model then refuses a bias with `add`. Rows are kept
# in a dict by hook point, so a later row replaces an earlier one. (Nor does the extra `lm-eval[sparsify]` help: it
# installs the PyPI package sparsify, which is another project's; EleutherAI's is eai-sparsify.) A `.pt` file works.
# Seen:
#     CSV, add: AssertionError: Bias is not supported for the `add` action.
#     CSV, clamp: steers at ['layers.1']
#     CSV, clamp, features 3 and 5 at layers.1: 1 hook, along feature 5
#     .pt, add: steers at ['layers.1']
set -euo pipefail
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.3 "lm-eval[hf]==0.4.13" \
    eai-sparsify==1.3.3 pandas
export HF_HUB_OFFLINE=1 HF_HOME=$WORK/hf WORK
"$WORK/venv/bin/python" - 2>"$WORK/log" <<'PY' || { tail -20 "$WORK/log"; exit 1; }
import os
import sys
from pathlib import Path

import torch
from lm_eval.models.hf_steered import SteeredModel
from sparsify import SparseCoder, SparseCoderConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(os.environ["WORK"])
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
LlamaForCausalLM(config).save_pretrained(folder / "model")
words = Tokenizer(models.WordLevel({f"word{index}": index for index in range(64)}, unk_token="word0"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0", eos_token="word1").save_pretrained(folder / "model")
coder = SparseCoder(32, SparseCoderConfig(num_latents=8, k=2))
coder.save_to_disk(folder / "sae" / "layers.1")


def steered(path):
    """The hooks of a steered model, or why there are none."""
    try:
        model = SteeredModel(pretrained=str(folder / "model"), steer_path=str(path), device="cpu")
    except AssertionError as error:
        return f"AssertionError: {error}"
    return model.hook_to_steer


def csv(*rows):
    path = folder / "steer.csv"
    head = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient"
    path.write_text("\n".join([head, *(f"sparsify,{action},{folder}/sae,layers.1,{row},10.0" for action, row in rows)]))
    return path


added, clamped, both = steered(csv(("add", 3))), steered(csv(("clamp", 3))), steered(csv(("clamp", 3), ("clamp", 5)))
entry = {"steering_vector": torch.ones(32), "steering_coefficient": 10.0, "action": "add", "bias": None}
torch.save({"layers.1": entry}, folder / "steer.pt")
file = steered(folder / "steer.pt")
print(f"CSV, add: {added}")
print(f"CSV, clamp: steers at {list(clamped)}")
rows = coder.W_dec.detach() / coder.W_dec.detach().norm(dim=-1, keepdim=True)
along = int((rows @ both["layers.1"].keywords["direction"].float()).argmax())
print(f"CSV, clamp, features 3 and 5 at layers.1: {len(both)} hook, along feature {along}")
print(f".pt, add: steers at {list(file)}")
fine = isinstance(added, str) and "Bias is not supported" in added and along == 5
fine = fine and [len(one) for one in (clamped, both, file)] == [1, 1, 1]
sys.exit(0 if fine else "CHANGED")
PY
echo "as described: the CSV form of lm-eval 0.4.13 cannot add, and keeps one row a layer"
