"""Vectors of repeng and steering-vectors steer the demo model here as their own hooks do: the same greedy tokens.

Each package makes its own vectors and runs them on transformers. They come here by a file: repeng's own GGUF, and for
steering-vectors, whose pickle is refused, ``torch.save`` of its dict. What each calls a token range, a scale or a norm
is what the guide "Your vectors" says it is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from vllm import LLM, RequestOutput, SamplingParams

from tests.engine.conftest import open_engine
from tests.support.hf_reference import ReferenceRun
from tests.support.mixed_batch import is_same_output
from tests.support.peers import peer
from vllm_steer import Direction, Steering, load_directions, register_directions, steered

pytestmark = [pytest.mark.slow, pytest.mark.engine]

LAYERS = (12, 16)
PROMPTS = (
    "My friend told me that her cat has died, and I said:",
    "The first thing that I noticed about the new town was",
    "Dear neighbours, I am writing to you because",
)
PAIRS = (
    ("I am so sorry, that must hurt.", "Noted. Proceed to the next item."),
    ("I am here with you, take your time.", "The result is what counts here."),
    ("Tell me how you feel about it.", "Give me the figures of last week."),
    ("You must have been so happy!", "The task was closed as planned."),
)
PROMPT_LEN = 9  # tokens; each of PROMPTS has more
NUM_TOKENS = 40
Way = tuple[str, list[Steering], AbstractContextManager[Any]]


class Home:
    """The demo model in transformers, float32, as the peers run it.

    Attributes:
        prompts: token ids of PROMPTS, all of one length, so that a batch of them needs no padding.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = [self.tokenizer(prompt).input_ids[:PROMPT_LEN] for prompt in PROMPTS]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # Greedy, and without an end: every text has NUM_TOKENS tokens.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def run(self) -> list[ReferenceRun]:
        """Greedy continuations of the prompts by `generate`, with its cache."""
        ids = torch.tensor(self.prompts)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[:, PROMPT_LEN:].tolist()
        best = torch.stack([row.topk(2, dim=-1).values for row in out.logits], dim=1)  # (prompts, steps, 2)
        gaps = (best[..., 0] - best[..., 1]).tolist()
        return [ReferenceRun(ids, ids, gap, [], PROMPT_LEN, {}, []) for ids, gap in zip(tokens, gaps, strict=True)]


@pytest.fixture(scope="module")
def home(demo_model: Path) -> Home:
    return Home(demo_model)


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Iterator[LLM]:
    with open_engine(demo_model, layers=list(LAYERS)) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(home: Home) -> list[list[int]]:
    """The unsteered continuations."""
    return [run.tokens for run in home.run()]


def generated(llm: LLM, home: Home, steering: list[list[Steering]]) -> list[RequestOutput]:
    """Our continuations of all prompts for each list of entries, in one batch."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    params = [steered(sampling, entries) for entries in steering for _ in home.prompts]
    prompts = [{"prompt_token_ids": ids} for ids in home.prompts] * len(steering)
    return llm.generate(prompts, params, use_tqdm=False)


def compare(llm: LLM, home: Home, plain: list[list[int]], ways: list[Way]) -> None:
    """Assert that our entries give the tokens that each peer's context gives, which differ from the plain ones."""
    expected: list[ReferenceRun] = []
    for _, _, context in ways:
        with context:
            expected += home.run()
    outputs = generated(llm, home, [entries for _, entries, _ in ways])
    labels = [f"{label}, prompt {number}" for label, _, _ in ways for number in range(len(PROMPTS))]
    same = [is_same_output(*one) for one in zip(outputs, expected, labels, strict=True)]
    # A near tie ends a comparison early, at a gap that rounding alone can bridge; most texts have none.
    assert sum(same) >= 0.75 * len(same), dict(zip(labels, same, strict=True))
    for label, run, unsteered in zip(labels, expected, plain * len(ways), strict=True):
        assert run.tokens != unsteered, f"{label} is as without steering"


def test_the_unsteered_model_is_the_same(llm: LLM, home: Home, plain: list[list[int]]) -> None:
    """Otherwise nothing below would say anything of steering."""
    assert [list(one.outputs[0].token_ids) for one in generated(llm, home, [[]])] == plain


def test_control_vectors_of_repeng(llm: LLM, home: Home, plain: list[list[int]], tmp_path: Path) -> None:
    """Every layer of ``layer_ids``, every token; ``coeff`` is alpha, ``normalize`` is keep_norm."""
    repeng = peer("repeng")
    pairs = [repeng.DatasetEntry(positive=warm, negative=cold) for warm, cold in PAIRS]
    vector = repeng.ControlVector.train(home.model, home.tokenizer, pairs, hidden_layers=list(LAYERS))
    vector.export_gguf(tmp_path / "repeng.gguf")
    directions = load_directions(tmp_path / "repeng.gguf")
    assert [one.key for one in directions] == [f"repeng@{layer}" for layer in LAYERS]
    register_directions(llm, directions)

    @contextmanager
    def controlled(layers: tuple[int, ...], coeff: float, **more: Any) -> Iterator[None]:
        model = repeng.ControlModel(home.model, list(layers))
        model.set_control(vector, coeff, **more)
        try:
            yield
        finally:
            model.unwrap()

    def entries(layers: tuple[int, ...], alpha: float, **more: Any) -> list[Steering]:
        return [Steering("repeng", alpha, layer=layer, **more) for layer in layers]

    ways = [(f"coeff {alpha}", entries(LAYERS, alpha), controlled(LAYERS, alpha)) for alpha in (30.0, -30.0)]
    compare(llm, home, plain, ways)
    kept = entries((16,), 60.0, keep_norm=True)
    one_layer = [("one layer, normalised", kept, controlled((16,), 60.0, normalize=True))]
    compare(llm, home, plain, one_layer)


@pytest.fixture(scope="module")
def hooks(llm: LLM, home: Home, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A vector of steering-vectors, registered here under the name "hooks"."""
    package: ModuleType = peer("steering_vectors")
    vector = package.train_steering_vector(home.model, home.tokenizer, list(PAIRS), layers=list(LAYERS))
    path = tmp_path_factory.mktemp("steering-vectors") / "hooks.pt"
    torch.save(vector.layer_activations, path)
    directions = load_directions(path, layer_index="block_output")
    assert [one.key for one in directions] == [f"hooks@{layer}" for layer in LAYERS]
    units = [Direction("hooks-unit", one.layer, one.vector).normalised() for one in directions]
    register_directions(llm, [*directions, *units])
    return vector


def hooked(alpha: float, span: str = "all") -> list[Steering]:
    return [Steering("hooks", alpha, layer=layer, span=span) for layer in LAYERS]


def test_hooks_of_steering_vectors(llm: LLM, home: Home, plain: list[list[int]], hooks: Any) -> None:
    """``multiplier`` is alpha; without a choice of tokens it is the span all."""
    ways = [(f"multiplier {alpha}", hooked(alpha), hooks.apply(home.model, multiplier=alpha)) for alpha in (1.0, -1.0)]
    compare(llm, home, plain, ways)


def test_operators_of_steering_vectors(llm: LLM, home: Home, plain: list[list[int]], hooks: Any) -> None:
    """They take the unit vector, and the multiplier counts lengths of the vector; alone, ablation ignores it."""
    package = peer("steering_vectors")
    lengths = {layer: float(one.norm()) for layer, one in hooks.layer_activations.items()}
    replaced = [Steering("hooks-unit", 2.0 * lengths[layer], layer=layer, op="set") for layer in LAYERS]
    ablated = [Steering("hooks-unit", layer=layer, op="ablate") for layer in LAYERS]
    ways: list[Way] = [
        ("ablated", ablated, hooks.apply(home.model, operator=package.ablation_operator(), multiplier=3.0)),
        (
            "ablated, then added",
            replaced,
            hooks.apply(home.model, operator=package.ablation_then_addition_operator(), multiplier=2.0),
        ),
    ]
    compare(llm, home, plain, ways)


def test_token_ranges_of_steering_vectors(llm: LLM, home: Home, plain: list[list[int]], hooks: Any) -> None:
    """They are counted within each forward pass, and beside a cache each generated token is a pass of its own.

    So an index from 1 on steers no generated token, and -1 is the last prompt token and all generated ones. Without
    ``min_token_index=None``, ``apply`` refuses ``token_indices`` beside its own default.
    """
    ranges: list[tuple[str, dict[str, Any]]] = [
        ("response", {"min_token_index": -1}),
        ("prompt[3:]", {"min_token_index": 3}),
        ("prompt[:2] + generated", {"min_token_index": None, "token_indices": slice(0, 2)}),
    ]
    ways = [(span, hooked(3.0, span), hooks.apply(home.model, multiplier=3.0, **chosen)) for span, chosen in ranges]
    compare(llm, home, plain, ways)


def test_a_list_of_tokens_of_steering_vectors_ends_at_the_first_generated_token(home: Home, hooks: Any) -> None:
    with hooks.apply(home.model, min_token_index=None, token_indices=[2]), pytest.raises(IndexError):
        home.run()
