"""The cost of steering against Hugging Face with hooks, on a tiny float32 model."""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vllm_steer
from batch_jobs.cost.cost_curve import CostCurve, CostPoint, read_cost, write_cost
from batch_jobs.cost.materials import Choice, CostMaterials, load_materials
from batch_jobs.cost.measure import _Scored, measure_cost
from batch_jobs.errors import StudyError
from batch_jobs.rows.grid import Condition
from vllm_steer import Direction

LAYER, ALPHA, MAX_MODEL_LEN = 2, 3.0, 64
# Measured in float32: up to 3e-6 relative; steering one token too few moves the perplexity by 1e-2 or more.
TOLERANCE = 1e-4
MATERIALS = CostMaterials(
    texts=("The river leaves the lake at its northern end.", "Bread dough is mixed from flour and water."),
    choices=(
        Choice(start="The opposite of hot is", options=(" cold", " round", " green"), right=0),
        Choice(start="Bees make", options=(" glass", " honey"), right=1),
        Choice(start="Snow is", options=(" white", " black", " purple"), right=0),
        Choice(
            start="Ice is frozen", options=(" water", " smoke from a fire"), right=0
        ),  # of one token, and of several
    ),
)


class Quiet:
    def watch(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()

    def warn(self, message: str) -> None:
        raise AssertionError(message)


def condition(alpha: float, span: str, scenario: str = "a") -> Condition:
    return Condition("tiny", LAYER, "calm", alpha, alpha / 9, "raw", scenario, "add", span)


@pytest.mark.slow
@pytest.mark.engine
def test_perplexity_and_accuracy_are_those_of_the_steered_model(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.conftest import open_engine
    from tests.support.hf_reference import Reference
    from tests.support.tiny_models import HIDDEN_SIZE, save_tiny_model

    checkpoint = save_tiny_model("llama", demo_model, tmp_path / "llama")
    measured: list[float] = []
    log_likelihoods = _Scored.log_likelihoods

    def recording(one: _Scored, output: Any) -> list[float]:
        found = log_likelihoods(one, output)
        measured.extend(found)
        return found

    monkeypatch.setattr(_Scored, "log_likelihoods", recording)
    direction = Direction("calm", LAYER, np.random.default_rng(4).standard_normal(HIDDEN_SIZE)).normalised()
    with open_engine(checkpoint, layers=[LAYER], max_model_len=MAX_MODEL_LEN) as engine:
        vllm_steer.register_directions(engine, [direction])
        tokenizer = engine.get_tokenizer()
        got = {
            span: measure_cost(
                engine,
                [condition(alpha, span, scenario) for scenario in ("a", "b") for alpha in (0.0, ALPHA)],
                MATERIALS,
                max_model_len=MAX_MODEL_LEN,
                progress=Quiet(),
            )
            for span in ("all", "generated")
        }
    reference = Reference(checkpoint)
    prefix = tokenizer.bos_token_id

    def log_likelihood(context: list[int], continuation: list[int], span: str, alpha: float) -> float:
        entry = {"layer": LAYER, "vector": np.array(direction.vector), "alpha": alpha, "span": span}
        return float(np.sum(reference.replay(context, continuation, [entry] if alpha else []).logprobs))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert len({len(ids(option)) for choice in MATERIALS.choices for option in choice.options}) > 1
    in_order = iter(measured)
    for span, points in got.items():
        assert [(point.layer, point.direction, point.alpha) for point in points] == [
            (None, None, 0.0),
            (LAYER, "calm", ALPHA),
        ]
        for point in points:
            tokens = sum(len(ids(text)) for text in MATERIALS.texts)
            of_texts = [log_likelihood([prefix], ids(text), span, point.alpha) for text in MATERIALS.texts]
            total = sum(of_texts)
            assert point.perplexity == pytest.approx(math.exp(-total / tokens), rel=TOLERANCE)
            of_options = [
                [
                    log_likelihood([prefix, *ids(choice.start)], ids(option), span, point.alpha)
                    for option in choice.options
                ]
                for choice in MATERIALS.choices
            ]
            expected = [*of_texts, *(one for options in of_options for one in options)]
            assert [next(in_order) for _ in expected] == pytest.approx(expected, rel=TOLERANCE)
            right = [
                np.argmax(options) == choice.right
                for options, choice in zip(of_options, MATERIALS.choices, strict=True)
            ]
            assert point.choice_accuracy == pytest.approx(np.mean(right))
            assert (point.tokens, point.choices) == (tokens, 4)
    assert not list(in_order)
    plain, steered = got["all"]
    assert abs(steered.perplexity / plain.perplexity - 1) > 0.01
    assert got["generated"][0] == plain
    assert got["generated"][1].perplexity != steered.perplexity


def test_a_text_longer_than_the_context_is_refused() -> None:
    class Engine:
        def get_tokenizer(self) -> object:
            class Tokenizer:
                bos_token_id = 1

                def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
                    return {"input_ids": [ord(letter) for letter in text]}

            return Tokenizer()

    with pytest.raises(StudyError, match="has 47 tokens; allowed: less than max_model_len, 40"):
        measure_cost(Engine(), [], MATERIALS, max_model_len=40, progress=Quiet())  # type: ignore[arg-type]


def test_the_bundled_materials_are_read_and_the_right_option_has_no_fixed_place() -> None:
    bundled = load_materials()
    assert len(bundled.texts) >= 8
    assert len(bundled.choices) >= 12
    assert {choice.right for choice in bundled.choices} == {0, 1, 2, 3}
    assert all(len(set(choice.options)) == len(choice.options) for choice in bundled.choices)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([{"start": "A", "options": [" b", " c"], "right": 2}], "0: Value error, right is 2; allowed: 0 to 1"),
        ([{"start": "A", "options": [" b"], "right": 0}], "0.options: Tuple should have at least 2 items"),
        ([], "the whole file: Tuple should have at least 1 item"),
        ({"start": "A"}, "the whole file: Input should be a valid tuple"),
    ],
)
def test_questions_of_another_form_are_refused(document: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load_materials(choices=path)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_the_cost_file_is_read_as_written(tmp_path: Path) -> None:
    points = (
        CostPoint(None, None, 0.0, 0.0, 12.5, 0.75, 400, 16),
        CostPoint(16, "empathy", -28.0, -0.2, 19.25, 0.5, 400, 16),
    )
    curve = CostCurve(load_materials().content_hash, points)
    write_cost(tmp_path / "cost.json", curve)
    assert read_cost(tmp_path / "cost.json") == curve
    cell = Condition("m", 16, "empathy", -28.0, -0.2, "raw", "a", "add", "all")
    assert curve.covers(load_materials(), [cell])
    assert not curve.covers(MATERIALS, [cell])
    assert not curve.covers(load_materials(), [cell, replace(cell, alpha=28.0)])
    with pytest.raises(StudyError, match="There is no cost file"):
        read_cost(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    with pytest.raises(StudyError, match=r"bad\.json: .*; delete it"):
        read_cost(tmp_path / "bad.json")
