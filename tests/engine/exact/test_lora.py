"""Requests with and without LoRA adapters, steered and not, in one batch: each equals Hugging Face with its adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vllm import LLM, RequestOutput
from vllm.lora.request import LoRARequest

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    Request,
    as_directions,
    check_answers,
    is_same_output,
    mixed_batch,
    random_prompts,
    references,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from vllm_steer import collect_readouts, register_directions

pytestmark = pytest.mark.engine

LAYERS = [0, 2, NUM_LAYERS - 1]
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE, seed=71)
REQUESTS = mixed_batch(VECTORS, random_prompts(VOCAB_SIZE, lengths=(3, 17, 33, 64, 90), seed=72))
MAX_TOKENS = 12
RANK, ALPHA = 8, 16
# As large as the model's weights: an adapter that is left out, or put on another request, changes every token.
ADAPTER_STD = 0.15


@dataclass(frozen=True)
class Variant:
    """The model with an adapter or, where `adapter` is None, without one."""

    adapter: LoRARequest | None
    reference: Reference


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "phi3"))]
)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model(family)


@pytest.fixture(scope="module")
def variants(family: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Variant]:
    """The plain model and two adapters of it."""
    adapted = []
    for number in (1, 2):
        reference, target = Reference(checkpoint), tmp_path_factory.mktemp("adapter")
        # vLLM takes adapters of embedding and head for some families only.
        merge_random_adapter(reference, target, whole=family != "qwen2", seed=number)
        adapted.append(Variant(LoRARequest(f"adapter {number}", number, str(target)), reference))
    return [Variant(None, Reference(checkpoint)), *adapted]


def merge_random_adapter(reference: Reference, target: Path, whole: bool, seed: int) -> None:
    """Write a random adapter of the blocks (if `whole`, of embedding and head too), and add it to the reference.

    The files are as PEFT writes them: W + (lora_alpha / r)·BA for a linear module's W, and the same for an embedding's
    transpose.
    """
    generator = torch.Generator().manual_seed(seed)
    adapted = {
        name: module
        for name, module in reference.model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and (whole or ".layers." in name)
    }
    tensors = {}
    for name, module in adapted.items():
        is_linear = isinstance(module, nn.Linear)
        outputs, inputs = module.weight.shape if is_linear else module.weight.T.shape
        a = ADAPTER_STD * torch.randn(RANK, inputs, generator=generator)
        b = ADAPTER_STD * torch.randn(outputs, RANK, generator=generator)
        for letter, matrix in (("A", a), ("B", b)):
            suffix = f"lora_{letter}.weight" if is_linear else f"lora_embedding_{letter}"
            tensors[f"base_model.model.{name}.{suffix}"] = matrix
        update = ALPHA / RANK * (b @ a)
        module.weight.data += update if is_linear else update.T
    save_file(tensors, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "bias": "none",
    }
    (target / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    adapters = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    with open_engine(checkpoint, layers=LAYERS, enable_prefix_caching=True, **adapters) as engine:
        register_directions(engine, as_directions(VECTORS))
        yield engine


def generate(llm: LLM, requests: list[Request], variants: list[Variant]) -> list[RequestOutput]:
    """One `generate` call, each request with its variant's adapter."""
    return llm.generate(
        [{"prompt_token_ids": request.prompt_ids} for request in requests],
        [request.params(max_tokens=MAX_TOKENS) for request in requests],
        lora_request=[variant.adapter for variant in variants],
        use_tqdm=False,
    )


@pytest.mark.conformance("LoRA")
def test_every_request_equals_hugging_face_with_the_weights_of_its_own_adapter(
    llm: LLM, variants: list[Variant], capsys: pytest.CaptureFixture[str]
) -> None:
    # Prompts repeat after 5 requests and readouts too, so each pair of these meets every adapter.
    given = [variants[i % len(variants)] for i in range(len(REQUESTS))]
    outs = generate(llm, REQUESTS, given)
    reads = [read for (read,) in collect_readouts(llm, outs)]
    excused = 0
    for variant in variants:
        mine = [i for i, other in enumerate(given) if other is variant]
        requests = [REQUESTS[i] for i in mine]
        expected = references(variant.reference, requests, MAX_TOKENS)
        excused += check_answers(
            variant.reference, requests, expected, [outs[i] for i in mine], [reads[i] for i in mine]
        )
    with capsys.disabled():
        print(f" [{len(REQUESTS)} requests, {excused} near ties excused]", end="")
    assert excused <= 2  # see test_parity


@pytest.mark.conformance("LoRA")
def test_the_prefix_cache_keeps_every_pair_of_adapter_and_steering_apart(llm: LLM, variants: list[Variant]) -> None:
    (prompt,) = random_prompts(VOCAB_SIZE, lengths=(2 * BLOCK_SIZE + 6,), seed=73)
    entry = {"name": "calm", "layer": 0, "vector": VECTORS["calm", 0], "alpha": 14.0, "op": "add", "span": "all"}
    pairs = [(variant, steering) for variant in variants for steering in ([], [entry])]
    expected: list[ReferenceRun] = [variant.reference.generate(prompt, MAX_TOKENS, s) for variant, s in pairs]
    assert len({tuple(truth.tokens) for truth in expected}) == len(pairs)
    assert llm.reset_prefix_cache()
    for cached in (0, 2 * BLOCK_SIZE):  # no blocks of other pairs the first time, its own the second time
        for (variant, steering), truth in zip(pairs, expected, strict=True):
            (out,) = generate(llm, [Request(prompt, steering, None)], [variant])
            assert out.num_cached_tokens == cached
            assert is_same_output(out, truth, f"{variant.adapter}, steering {bool(steering)}")
