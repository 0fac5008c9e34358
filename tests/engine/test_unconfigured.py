"""The plugin installed but not configured: vLLM as it is without the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from vllm import LLM, SamplingParams

from tests.engine.conftest import BLOCK_SIZE, KV_BYTES, OpenEngine
from tests.support.mixed_batch import random_prompts
from tests.support.tiny_models import VOCAB_SIZE
from vllm_steer import Direction, Readout, Steering, errors, register_directions, steered

pytestmark = pytest.mark.engine

MAX_TOKENS = 12
# One engine that samples and decodes greedily, with and without the plugin. Run in a process of its own, because a
# plugin that has been loaded cannot be unloaded.
STOCK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

job = json.load(sys.stdin)
llm = LLM(**job["engine"])
prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
outs = llm.generate(prompts, [SamplingParams(**fields) for fields in job["params"]], use_tqdm=False)
answers = [[list(sample.token_ids) for sample in out.outputs] for out in outs]
json.dump({"answers": answers, "has_plugin": "vllm_steer" in sys.modules}, open(job["answer_file"], "w"))
"""


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(checkpoint) as engine:
        yield engine


def forward_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_layer_has_a_hook(llm: LLM) -> None:
    assert "vllm_steer.plugin" in sys.modules  # else this test would show nothing
    assert llm.apply_model(forward_hooks) == [0]


def test_tokens_are_those_of_vllm_without_the_plugin(llm: LLM, checkpoint: Path, tmp_path: Path) -> None:
    prompts = random_prompts(VOCAB_SIZE, lengths=(4, 20, 33, 61), seed=51)
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    sampled = greedy | {"temperature": 1.0, "seed": 7, "n": 2}
    params = [greedy, sampled, greedy, sampled]
    job = {
        "engine": {
            "model": str(checkpoint),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 256,
            "max_num_seqs": 64,
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": KV_BYTES,
            "seed": 0,
        },
        "prompts": prompts,
        "params": params,
        "answer_file": str(tmp_path / "answer.json"),
    }
    outcome = subprocess.run(
        [sys.executable, "-c", STOCK_VLLM],
        input=json.dumps(job),
        env=os.environ | {"VLLM_PLUGINS": ""},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    stock = json.loads((tmp_path / "answer.json").read_text())
    assert not stock["has_plugin"]

    outs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(**fields) for fields in params],
        use_tqdm=False,
    )
    assert [[list(sample.token_ids) for sample in out.outputs] for out in outs] == stock["answers"]


def test_steering_and_readout_are_refused_and_not_ignored(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5, 6, 7]}
    plain = SamplingParams(temperature=0.0, max_tokens=2)
    for params in (
        steered(plain, [Steering("calm", layer=1, alpha=1.0)]),
        steered(plain, readout=Readout(layers=[1])),
    ):
        with pytest.raises(errors.NotConfigured, match="steer_config"):
            llm.generate([prompt], params, use_tqdm=False)
    assert len(llm.generate([prompt], plain, use_tqdm=False)[0].outputs[0].token_ids) == 2


def test_registration_is_refused(llm: LLM) -> None:
    with pytest.raises(errors.NotConfigured, match="steer_config"):
        register_directions(llm, [Direction("calm", 1, [1.0] * 128)])
