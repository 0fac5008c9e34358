"""A prompt of 32,000 tokens in chunks: steered and read as in Hugging Face, in tables no larger than for short ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Entry, Reference, ReferenceRun
from tests.support.mixed_batch import (
    Request,
    as_directions,
    check_readout,
    check_trace,
    is_same_output,
    random_prompts,
    run,
    trace_name,
    unit_vectors,
)
from tests.support.tiny_configs import HEAD_SIZE, INIT_STD
from vllm_steer import register_directions
from vllm_steer.engine.reader_blocks import BLOCK_SUMS
from vllm_steer.engine.worker.worker_steering import WorkerSteering, steering_of
from vllm_steer.plan.step_plan import StepPlan

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS, HEADS = [0, 1], 2
SIZE = HEADS * HEAD_SIZE
VOCAB = 512
PROMPT_LEN, CHUNK, MAX_TOKENS = 32_000, 2048, 3
MAX_LEN = 40_000
BLOCK_SUMS_MIB = 4
TRACE_COLUMNS = 2
MIDDLE = PROMPT_LEN // 2
VECTORS = unit_vectors(LAYERS, SIZE, seed=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random blocks with two heads, for 40,960 positions."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=SIZE,
        intermediate_size=2 * SIZE,
        num_hidden_layers=len(LAYERS),
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        max_position_embeddings=40_960,
        initializer_range=INIT_STD,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    target = tmp_path_factory.mktemp("long")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def engine(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(
        checkpoint,
        layers=LAYERS,
        config={"block_sums_mib": BLOCK_SUMS_MIB, "trace_columns": TRACE_COLUMNS},
        max_model_len=MAX_LEN,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
    ) as llm:
        register_directions(llm, as_directions(VECTORS))
        yield llm


def entry(name: str, layer: int, alpha: float, span: str) -> Entry:
    return {
        "name": name, "layer": layer, "vector": VECTORS[name, layer], "alpha": alpha, "op": "add", "span": span
    }  # fmt: skip


# In the middle of the prompt, on a boundary of chunks, and on everything.
STEERING = [
    entry("calm", 0, 6.0, "all"),
    entry("calm", 1, 9.0, f"prompt[{MIDDLE - 5}:{MIDDLE + 5}] + response"),
    entry("calm", 1, -7.0, f"prompt[{8 * CHUNK - 3}:{8 * CHUNK + 3}]"),
]


def requests(prompt: Sequence[int]) -> dict[str, Request]:
    """One prompt and steering, read in every way that the engine allows."""
    asked: dict[str, dict[str, Any]] = {
        "mean": {"layers": LAYERS, "span": "prompt"},
        "last": {"layers": LAYERS, "span": "prompt", "pool": "last"},
        "part": {"layers": LAYERS, "span": f"prompt[{MIDDLE - 300}:{MIDDLE + 300}]"},
        "rows": {"layers": LAYERS, "span": f"prompt[{PROMPT_LEN - 40}:] + generated", "pool": "rows"},
        "trace": {"layers": LAYERS, "span": "prompt", "trace": [trace_name("calm", 1)]},
    }
    return {
        how: Request(list(prompt), STEERING, readout, {("calm", 1): VECTORS["calm", 1]})
        for how, readout in asked.items()
    }


@torch.inference_mode()
def replayed(reference: Reference, prompt: Sequence[int], tokens: Sequence[int]) -> ReferenceRun:
    """``Reference.replay`` chunk by chunk, since the scores of all pairs of 32,000 tokens would take gigabytes."""
    cache = reference._begin(prompt, STEERING)
    fed = [*prompt, *tokens[:-1]]
    logits = [reference._forward(fed[at : at + 500], cache) for at in range(0, len(fed), 500)]
    return reference._finish(list(tokens), list(torch.cat([one.clone() for one in logits])[len(prompt) - 1 :]))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return random_prompts(VOCAB, lengths=(PROMPT_LEN,), seed=6)[0]


def steering(llm: LLM) -> WorkerSteering:
    found = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    one = steering_of(found)
    assert one is not None
    return one


def tensors(worker: WorkerSteering) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of all tensors of a worker."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, value in vars(worker.buffers).items():
        many = value if isinstance(value, list) else [value]
        found[name] = [tuple(one.shape) for one in many if isinstance(one, torch.Tensor)]
    return {name: shapes for name, shapes in found.items() if shapes}


def arrays(plan: StepPlan) -> dict[str, int]:
    """The number of elements of each array and list of a step's plan."""
    fields = {name: getattr(plan, name) for name in StepPlan.__slots__}
    return {name: np.size(one) if isinstance(one, np.ndarray) else len(one) for name, one in fields.items()
            if isinstance(one, np.ndarray | list)}  # fmt: skip


@pytest.fixture(scope="module")
def plans(engine: LLM) -> Iterator[list[dict[str, int]]]:
    """The sizes of all plans that the worker has written, in order."""
    seen: list[dict[str, int]] = []
    buffers = steering(engine).buffers
    write = buffers.write

    def watched(plan: StepPlan | None) -> None:
        if plan is not None:
            seen.append(arrays(plan))
        write(plan)

    buffers.write = watched  # type: ignore[method-assign]
    yield seen
    del buffers.write


def test_a_long_prompt_is_steered_and_read_in_tables_of_the_size_for_short_ones(
    engine: LLM, reference: Reference, prompt: list[int], plans: list[dict[str, int]]
) -> None:
    worker = steering(engine)
    # As many tokens in one step as a chunk of the long prompt has, all steered, read and traced.
    short = [Request(one, [STEERING[0]], {"layers": LAYERS, "span": "prompt"})
             for one in random_prompts(VOCAB, lengths=(CHUNK // 8,) * 8, seed=7)]  # fmt: skip
    run(engine, short, max_tokens=MAX_TOKENS)
    of_short, shapes_of_short = {name: max(one[name] for one in plans) for name in plans[0]}, tensors(worker)
    assert of_short["row_of_token_T"] == CHUNK
    plans.clear()

    asked = requests(prompt)
    outs, reads = [], []
    for request in asked.values():  # one after another, so that those in between find the prompt in the cache
        (out,), ((read,),) = run(engine, [request], max_tokens=MAX_TOKENS)
        outs.append(out)
        reads.append(read)
    assert outs[0].num_cached_tokens == 0
    # Whole blocks; of the rows that are read, none may come from the cache.
    assert outs[1].num_cached_tokens == (PROMPT_LEN - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert PROMPT_LEN - 40 - 2 * BLOCK_SIZE < outs[3].num_cached_tokens <= PROMPT_LEN - 40
    assert outs[4].num_cached_tokens == 0, "a trace needs every token"

    tokens = list(outs[0].outputs[0].token_ids)
    truth = replayed(reference, prompt, tokens)
    assert truth.choices == tokens
    for request, out, read in zip(asked.values(), outs, reads, strict=True):
        assert is_same_output(out, truth, request.label)
        check_readout(read, request.readout, truth, request.label)
        check_trace(read, request, truth)

    assert tensors(worker) == shapes_of_short
    # ``loaded`` has one item for the request that begins; its rows of blocks are one number for a cached block.
    of_long = {name: max(one[name] for one in plans) for name in plans[0]}
    assert {name: size for name, size in of_long.items() if size > max(of_short[name], 8)} == {}


def test_only_the_sums_of_blocks_have_more_rows_than_a_step_and_they_are_bounded(engine: LLM) -> None:
    worker = steering(engine)
    accumulators = worker.planner.max_requests
    kept = (BLOCK_SUMS_MIB << 20) // (2 * 4 * len(LAYERS) * SIZE)  # two float32 rows a block at each layer
    rows = {name: max(shape[0] for shape in shapes if shape) for name, shapes in tensors(worker).items()}
    assert rows["sums_L_AD"] == rows["last_L_AD"] == accumulators + kept
    del rows["sums_L_AD"], rows["last_L_AD"], rows["_packed"]
    assert max(rows.values()) == CHUNK == rows["row_of_token"] == rows["trace_TK"] == rows["rows_L_TD"]
    packed = worker.buffers._packed.numel() - CHUNK
    # The tables beside the row of each token depend on requests, windows and layers, not on the model's context.
    assert packed < MAX_LEN
    table = BLOCK_SUMS.of(engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager)
    assert table is not None
    assert PROMPT_LEN // BLOCK_SIZE <= len(table) <= kept
