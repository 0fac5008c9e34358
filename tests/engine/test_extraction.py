"""Extracted directions are those of Hugging Face's hidden states of the same texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM

from tests.engine.conftest import OpenEngine
from vllm_steer import extract_directions, register_directions
from vllm_steer.errors import BadReadout, BadVector, LayerNotHooked, MalformedSpec, SteerError

pytestmark = pytest.mark.engine

LAYERS = [0, 2]
KIND = ["I am so sorry, that must hurt.", "How lovely to see you.", "Take all the time you need."]
COLD = ["Noted.", "Proceed to the next item on the list.", "Not my problem."]
CHAT = [
    {"role": "user", "content": "My cat has died."},
    {"role": "assistant", "content": "I am so sorry."},
]


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(checkpoint, layers=LAYERS) as engine:
        yield engine


@pytest.fixture(scope="module")
def states(checkpoint: Path) -> Any:
    """A function from token ids to the (T, D) hidden states behind each layer."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def of(ids: list[int]) -> dict[int, Any]:
        with torch.inference_mode():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return {layer: hidden[layer + 1][0].double().numpy() for layer in LAYERS}

    return of


@pytest.mark.conformance("extraction", family="llama")
@pytest.mark.parametrize(
    ("fields", "pooled"),
    [
        ({}, lambda rows: rows.mean(axis=0)),
        ({"skip_first": 1}, lambda rows: rows[1:].mean(axis=0)),
        ({"pool": "last"}, lambda rows: rows[-1]),
        ({"span": "prompt[-2:]"}, lambda rows: rows[-2:].mean(axis=0)),
    ],
)
def test_a_direction_is_that_of_the_hidden_states(
    llm: LLM, checkpoint: Path, states: Any, fields: dict[str, Any], pooled: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = extract_directions(llm, KIND, COLD, LAYERS, name="kind", **fields)
    assert [one.key for one in found] == ["kind@0", "kind@2"]
    sides = [[states(tokenizer(text).input_ids) for text in side] for side in (KIND, COLD)]
    for one in found:
        kind, cold = (np.mean([pooled(text[one.layer]) for text in side], axis=0) for side in sides)
        wanted = (kind - cold) / np.linalg.norm(kind - cold)
        np.testing.assert_allclose(one.vector, wanted, atol=2e-4)  # float32 in another order; a token more: over 1e-2
        lengths = [np.linalg.norm(pooled(text[one.layer])) for side in sides for text in side]
        assert one.metadata["mean_residual_norm"] == pytest.approx(np.mean(lengths), rel=1e-4)
        assert (one.metadata["num_positive"], one.metadata["method"]) == (3, "mean_difference")
    register_directions(llm, found)


def test_chats_are_read_in_the_model_s_template_up_to_the_end_of_the_answer(
    llm: LLM, checkpoint: Path, states: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answered = tokenizer.apply_chat_template(CHAT, continue_final_message=True, tokenize=False)
    asked = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    assert answered.endswith("I am so sorry.")
    ends = [states(tokenizer(text, add_special_tokens=False).input_ids)[2][-1] for text in (answered, asked)]
    (found,) = extract_directions(llm, [CHAT], [CHAT[:1]], [2], name="kind", pool="last")
    wanted = (ends[0] - ends[1]) / np.linalg.norm(ends[0] - ends[1])
    np.testing.assert_allclose(found.vector, wanted, atol=2e-4)


REFUSED: list[tuple[dict[str, Any], type[SteerError], str]] = [
    ({"pool": "max"}, BadReadout, "gives no vectors"),
    ({"positive": "one text"}, MalformedSpec, "positive is 'one text'"),
    ({"negative": [["no message"]]}, MalformedSpec, "a text is"),
    ({"negative": []}, BadVector, "one side has no texts"),
    ({"span": "generated"}, BadReadout, "holds no token of text 0"),
    ({"layers": [1]}, LayerNotHooked, "layer 1"),
    ({"method": "svm"}, MalformedSpec, "method is 'svm'"),
    ({"negative": KIND}, BadVector, "the same mean"),
]


@pytest.mark.parametrize(("fields", "refusal", "told"), REFUSED)
def test_what_gives_no_direction_is_refused(
    llm: LLM, fields: dict[str, Any], refusal: type[SteerError], told: str
) -> None:
    with pytest.raises(refusal, match=told):
        extract_directions(llm, **{"positive": KIND, "negative": COLD, "layers": LAYERS, "name": "kind", **fields})
