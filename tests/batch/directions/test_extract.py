"""How each text is read, and where its readout is kept, with an engine that answers from a formula."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vllm_steer
from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.extract import extract_readouts, read_study_texts
from batch_jobs.engine.progress import Work
from batch_jobs.texts.contrastive import Pair, Split
from vllm_steer import ReadoutResult

SPLIT = Split(
    train=(Pair("a", "s", "kind one", "cold 1"), Pair("b", "s", "kind number two", "cold 22")),
    test=(Pair("c", "s", "I help and listen", "I win"),),
)


class FormulaEngine:
    """One token per letter; a token's residual stream at layer ℓ is (letter code, ℓ)."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.lost: int | None = None

    def get_tokenizer(self) -> FormulaEngine:
        return self

    def __call__(self, text: str, *, max_length: int = 10**9, **_: Any) -> Any:
        return {"input_ids": [ord(letter) for letter in text][:max_length]}

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        self.batches.append(len(prompts))
        return [
            SimpleNamespace(ids=prompt["prompt_token_ids"], readout=wanted)
            for prompt, wanted in zip(prompts, params, strict=True)
        ]


class SilentProgress:
    def __init__(self) -> None:
        self.works: list[Work] = []

    @contextmanager
    def watch(self, engine: Any, title: str, work: Work) -> Iterator[None]:
        self.works.append(work)
        yield

    def warn(self, message: str) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    made = FormulaEngine()

    def collected(_: Any, outputs: list[Any]) -> list[list[ReadoutResult | None]]:
        results: list[list[ReadoutResult | None]] = []
        for place, output in enumerate(outputs):
            kept = output.ids[output.readout.skip_first :]
            means = {layer: np.array([np.mean(kept), layer], np.float64) for layer in output.readout.layers}
            results.append([None if place == made.lost else ReadoutResult(means, len(kept), {})])
        return results

    stand_ins = {"steered": lambda fields, entries, readout: readout, "collect_readouts": collected}
    for name, stand_in in stand_ins.items():
        # set in the namespace itself: setattr would look the real one up first, and so import vLLM
        monkeypatch.setitem(vars(vllm_steer), name, stand_in)
    return made


def study(**changes: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "model": "m",
            "extract": {"layers": [2], "max_tokens": 12},
            "steer": {"layers": [2], "alphas": [0], "scenarios": ["s"]},
        }
        | changes
    )


def mean_of(text: str) -> float:
    return sum(map(ord, text)) / len(text)


def test_every_text_is_read_once_and_gives_both_poolings(engine: FormulaEngine) -> None:
    progress = SilentProgress()
    got = read_study_texts(engine, study(), SPLIT, num_layers=4, progress=progress)
    assert engine.batches == [10]  # 3 pairs and one ablated text; three first letters: k, c, I
    assert (got.poolings, got.blocks) == ((0, 1), (2,))
    # "kind number two" is cut to 12 letters
    expected = {0: ["kind one", "kind number "], 1: ["ind one", "ind number "]}
    for skip_first, texts in expected.items():
        train = got.train(skip_first, 2)
        np.testing.assert_allclose(train.positive_ND, [[mean_of(text), 2] for text in texts], rtol=1e-6)
        assert train.positive_ND.dtype == np.float32
    np.testing.assert_allclose(got.test(1, 2).negative_ND, [[mean_of(" win"), 2]], rtol=1e-6)
    letters = sum(min(len(text), 12) for pair in (*SPLIT.train, *SPLIT.test) for text in (pair.positive, pair.negative))
    # the ablated text is cut to 12, like its original
    assert progress.works == [Work(10, letters + 12 + 3, 1)]


def test_the_smaller_pooling_holds_the_skipped_tokens_of_every_text(engine: FormulaEngine) -> None:
    texts = ["abcdef", "abcxyz", "zzzq"]
    got = extract_readouts(engine, texts, [2], poolings=[3, 1, 0], max_tokens=9, progress=SilentProgress())
    assert engine.batches == [7]  # the texts, and "abc" and "zzz" under two poolings
    for skip_first in (0, 1, 3):
        wanted = [[mean_of(text[skip_first:]), 2] for text in texts]
        np.testing.assert_allclose(got.by_pooling[skip_first][2], wanted, rtol=1e-6)
    assert got.num_tokens == (6, 6, 4)


def test_one_pooling_without_a_skip_reads_the_texts_alone(engine: FormulaEngine) -> None:
    got = extract_readouts(engine, ["abc", "b"], [2], poolings=[0], max_tokens=9, progress=SilentProgress())
    assert engine.batches == [2]
    np.testing.assert_allclose(got.by_pooling[0][2], [[mean_of("abc"), 2], [mean_of("b"), 2]], rtol=1e-6)


def test_texts_are_told_by_pair_digest_and_length(engine: FormulaEngine) -> None:
    got = read_study_texts(engine, study(), SPLIT, num_layers=4, progress=SilentProgress())
    second = got.texts["train_positive"][1]
    assert (second.pair_id, second.num_tokens, second.replacements) == ("b", 12, 0)
    assert second.sha256 == hashlib.sha256(b"kind number two").hexdigest()


def test_only_the_positive_test_texts_are_ablated(engine: FormulaEngine) -> None:
    got = read_study_texts(engine, study(), SPLIT, num_layers=4, progress=SilentProgress())
    assert [text.replacements for text in got.texts["test_positive_ablated"]] == [2]
    # the only stand-ins of help and listen
    np.testing.assert_allclose(got.ablated_test(0, 2).positive_ND, [[mean_of("I aid and at"), 2]], rtol=1e-6)
    plain = study(validation={"lexical_ablation": False})
    assert (
        "test_positive_ablated"
        not in read_study_texts(engine, plain, SPLIT, num_layers=4, progress=SilentProgress()).texts
    )


@pytest.mark.parametrize(
    ("changes", "blocks", "poolings"),
    [
        ({"skip_first": 3}, (2,), (0, 3)),
        ({"validation": {"all_layers": True}}, (0, 1, 2, 3), (0, 1)),
        ({"extract": {"layers": [2], "extract_offset": -1}}, (1, 2), (0, 1)),
    ],
)
def test_blocks_and_poolings_follow_the_study(
    engine: FormulaEngine, changes: dict[str, Any], blocks: tuple[int, ...], poolings: tuple[int, ...]
) -> None:
    got = read_study_texts(engine, study(**changes), SPLIT, num_layers=4, progress=SilentProgress())
    assert (got.blocks, got.poolings) == (blocks, poolings)
    for block in blocks:
        assert set(got.train(0, block).positive_ND[:, 1]) == {block}


def test_a_layer_that_the_model_lacks_is_refused_before_anything_is_read(engine: FormulaEngine) -> None:
    with pytest.raises(StudyError, match=r"extract\.layers \[2\] do not exist"):
        read_study_texts(engine, study(), SPLIT, num_layers=2, progress=SilentProgress())
    assert engine.batches == []


def test_a_text_shorter_than_the_skip_is_refused(engine: FormulaEngine) -> None:
    with pytest.raises(StudyError, match="'cold' has 4 tokens and skip_first leaves out 4"):
        extract_readouts(engine, ["longer", "cold"], [2], poolings=[0, 4], max_tokens=9, progress=SilentProgress())


def test_a_readout_that_did_not_come_back_is_named_by_its_text(engine: FormulaEngine) -> None:
    engine.lost = 1
    with pytest.raises(StudyError, match="no readout for the text 'second'"):
        extract_readouts(engine, ["first", "second"], [2], poolings=[0, 1], max_tokens=9, progress=SilentProgress())
    engine.lost = 2  # "f", for the mean over all tokens
    with pytest.raises(StudyError, match="no readout for the text 'the first 1 tokens"):
        extract_readouts(engine, ["first", "second"], [2], poolings=[0, 1], max_tokens=9, progress=SilentProgress())
