#!/usr/bin/env bash
# lm-eval 0.4.13, local-completions: `gen_kwargs` reach what a task generates and never its log-likelihoods, and a cache
# does not know which model it answers for.
#
# An evaluation with gen_kwargs={"steering": ...} sends the field with each generation. A multiple-choice task under the
# same gen_kwargs sends it with nothing and reports unsteered numbers, without a warning. With use_cache, a second
# evaluation of another model name at the same server sends nothing at all: it is answered from the first one's file.
# Seen:
#     generation: 1 requests, with steering: 1
#     multiple choice: 2 requests, with steering: 0
#     another model with the same cache: 0 requests
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check "lm-eval[api]==0.4.13"
export HF_HUB_OFFLINE=1 HF_HOME=$WORK/hf WORK
PYTHONPATH=$HERE/common "$WORK/venv/bin/python" - 2>"$WORK/log" <<'EOF' || { tail -20 "$WORK/log"; exit 1; }
import json
import os
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager
from stub_server import serve


def answer(path, body):
    """A server of completions whose tokens are words; every word has the log-probability -1."""
    if body is None:
        return {"tokenizer_class": "Words", "eos_token": "end", "bos_token": None, "pad_token": None}
    if path == "/tokenize":
        return {"tokens": list(range(len(body["prompt"].split())))}
    choices = []
    for index, prompt in enumerate(body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]):
        count = len(prompt) if isinstance(prompt, list) else 1
        scores = {
            "tokens": ["word"] * (count + 1),
            "token_logprobs": [None] + [-1.0] * count,
            "top_logprobs": [None] + [{"word": -1.0}] * count,
        }
        choices.append({"index": index, "text": "yes", "logprobs": scores, "finish_reason": "length"})
    return {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": choices}


url, arrived = serve(answer)
folder = Path(os.environ["WORK"])
(folder / "docs.json").write_text(json.dumps({"text": "one two three"}) + "\n")
data = {"data_files": {"test": str(folder / "docs.json")}}
source = {"task": "local", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "text"}
generation = {**source, "output_type": "generate_until", "doc_to_target": "yes"}
choice = {**source, "output_type": "multiple_choice", "doc_to_choice": ["four", "five"], "doc_to_target": 0}


def requests(task, name="m", backend="none", **options):
    """What an evaluation of one document sends."""
    arrived.clear()
    place = {"model": name, "base_url": f"{url}/v1/completions"}
    lm_eval.simple_evaluate(
        "local-completions", model_args={**place, "tokenizer_backend": backend}, tasks=[dict(task)], bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False), **options,
    )
    return [body for body in arrived if "max_tokens" in body]  # not those to the tokenizer


steering = {"steering": [{"direction": "kind", "alpha": 5}]}
generated = requests(generation, gen_kwargs=steering)
chosen = requests(choice, backend="remote", gen_kwargs=steering)
cache = str(folder / "cache")
requests(generation, use_cache=cache)
again = requests(generation, name="another", use_cache=cache)
seen = [(len(bodies), sum("steering" in body for body in bodies)) for bodies in (generated, chosen, again)]
print(f"generation: {seen[0][0]} requests, with steering: {seen[0][1]}")
print(f"multiple choice: {seen[1][0]} requests, with steering: {seen[1][1]}")
print(f"another model with the same cache: {seen[2][0]} requests")
sys.exit(0 if seen == [(1, 1), (2, 0), (0, 0)] else "CHANGED")
EOF
echo "as described: lm-eval 0.4.13 steers generations alone, and its cache does not know the model"
