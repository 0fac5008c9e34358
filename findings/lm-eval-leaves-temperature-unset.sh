#!/usr/bin/env bash
# lm-eval 0.4.13, `normalize_gen_kwargs`: a task that says neither `do_sample` nor `temperature` gets `do_sample=False`
# and no temperature, although the function's description promises 0.0. A model that drops `do_sample`, as lm-eval's
# own `vllm` does on its way to SamplingParams, then samples at that engine's default temperature of 1.
# Seen:
#     nothing said: {'do_sample': False, 'until': [], 'max_gen_toks': 256}
#     do_sample=False: temperature 0.0
# A model class of one's own has to set the temperature itself.
set -euo pipefail
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.3 "lm-eval[hf]==0.4.13"
"$WORK/venv/bin/python" - 2>"$WORK/log" <<'PY' || { tail -20 "$WORK/log"; exit 1; }
import inspect
import sys

from lm_eval.models.utils import normalize_gen_kwargs

silent, greedy = normalize_gen_kwargs({}), normalize_gen_kwargs({"do_sample": False})
print("nothing said:", silent)
print("do_sample=False: temperature", greedy["temperature"])
promised = "set to 0.0 if do_sample=False or do_sample is not specified" in " ".join(inspect.getdoc(normalize_gen_kwargs).split())
fine = promised and silent["do_sample"] is False and "temperature" not in silent and greedy["temperature"] == 0.0
sys.exit(0 if fine else "CHANGED")
PY
echo "as described: lm-eval 0.4.13 leaves the temperature of a silent task to the engine"
