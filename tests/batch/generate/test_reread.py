"""The unsteered re-reading of completions against Hugging Face, on a tiny float32 model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vllm_steer
from batch_jobs.generate.reread import FinishedRow, Reread, reread
from vllm_steer import Direction
from vllm_steer.errors import ReadoutUnavailable

LAYERS = (1, 3)
MAX_MODEL_LEN = 96
# Measured in float32: up to 2e-6, and a mean with one token too few at either end is 1e-3 or more off.
LOG_LIKELIHOOD_TOLERANCE = 1e-4
# Relative to the mean's norm. Measured: up to 3e-7, and 3e-3 or more with one token too few.
PROJECTION_TOLERANCE = 1e-4


class Heard:
    """Progress that keeps its messages."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def watch(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def rows_of_many_shapes(vocab_size: int) -> list[FinishedRow]:
    """Prompts and completions of mixed lengths, read at both layers; shared prompts, the beginning of a completion that
    another one shares, and one whole text three times, at both layers and for both directions."""
    rng = np.random.default_rng(3)

    def ids(length: int) -> list[int]:
        drawn: list[int] = rng.integers(3, vocab_size, size=length).tolist()
        return drawn

    shared, ended = ids(40), 2  # 2 ends a sequence in these checkpoints
    text = FinishedRow(shared, ids(50), 3, "calm")
    return [
        FinishedRow(ids(1), ids(1), 1, "bold"),
        FinishedRow(ids(33), [*ids(7), ended], 1, "calm"),
        FinishedRow(shared, ids(30), 1, "bold"),
        FinishedRow(shared, ids(30), 3, "bold"),
        text,
        FinishedRow(ids(5), [], 1, "calm"),
        FinishedRow(ids(8), [ended], 3, "bold"),
        replace(text, layer=1),
        replace(text, direction="bold"),
        FinishedRow(shared, [*text.completion_ids[:40], *ids(10)], 1, "calm"),
        FinishedRow(ids(60), ids(60), 3, "calm"),  # 120 tokens do not fit: the end is cut
        FinishedRow(ids(MAX_MODEL_LEN - 1), ids(4), 1, "calm"),  # the prompt leaves no place for a token
    ]


@pytest.mark.slow
@pytest.mark.engine
def test_log_likelihoods_and_projections_are_those_of_the_unsteered_model(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.conftest import open_engine
    from tests.support.hf_reference import Reference
    from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, save_tiny_model

    checkpoint = save_tiny_model("llama", demo_model, tmp_path / "llama")
    reference = Reference(checkpoint)
    rng = np.random.default_rng(4)
    vectors = {(name, layer): rng.standard_normal(HIDDEN_SIZE) for name in ("calm", "bold") for layer in LAYERS}
    directions = [Direction(name, layer, vector).normalised() for (name, layer), vector in vectors.items()]
    rows = rows_of_many_shapes(VOCAB_SIZE)
    # A step takes 32 tokens, so most rows are read in several chunks, beside other rows.
    with open_engine(
        checkpoint,
        layers=list(LAYERS),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        block_size=32,  # the shared prompt has 40 tokens
        enable_prefix_caching=True,
    ) as engine:
        vllm_steer.register_directions(engine, directions)
        cached = cached_tokens(engine, monkeypatch)
        got = reread(engine, rows, max_model_len=MAX_MODEL_LEN, progress=Heard())
        again = reread(engine, rows, max_model_len=MAX_MODEL_LEN, progress=Heard())  # every prompt is cached by now

    # The second reading finds whole texts, and reads them once more without the cache.
    assert len(cached) == 4
    assert [len(of_batch) for of_batch in cached[::2]] == [9, 9]  # ten rows with a text, of which two have the same
    assert all(of_batch and max(of_batch) > 0 for of_batch in cached[::2])  # each finds prompts of others
    assert cached[1]
    assert cached[3]
    assert not any(cached[1] + cached[3])

    assert [index for index, result in enumerate(got) if result == Reread(None, None)] == [5, 11]
    for index, row in enumerate(rows):
        if index in (5, 11):
            continue
        kept = list(row.completion_ids)[: MAX_MODEL_LEN - 1 - len(row.prompt_ids)]
        # the reference does not feed back its last token, so add one: the mean includes the row's last token
        truth = reference.replay(list(row.prompt_ids), [*kept, 0])
        unit = vectors[row.direction, row.layer] / np.linalg.norm(vectors[row.direction, row.layer])
        mean = truth.mean(row.layer, "generated")
        for result in (got[index], again[index]):
            assert result.log_likelihood == pytest.approx(np.mean(truth.logprobs[:-1]), abs=LOG_LIKELIHOOD_TOLERANCE), (
                index
            )
            assert result.projection == pytest.approx(mean @ unit, abs=PROJECTION_TOLERANCE * np.linalg.norm(mean)), (
                index
            )


def cached_tokens(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Gets, for each batch from now on, how many tokens of each request came from the cache."""
    counts: list[list[int]] = []
    generate = engine.generate

    def counting(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        counts.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine, "generate", counting)
    return counts


class FixedEngine:
    """Gives every token the log-probability -its id / 100, and ends the rows named in `aborted` early. The first batch
    finds `cached` tokens of each row in the cache, and has no log-probabilities of them."""

    def __init__(self, aborted: tuple[int, ...] = (), cached: int = 0) -> None:
        self.aborted = aborted
        self.cached = cached
        self.read: list[list[int]] = []
        self.batches = 0

    def get_metrics(self) -> list[Any]:
        return []

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        self.read = [prompt["prompt_token_ids"] for prompt in prompts]
        self.batches += 1
        cached = self.cached if self.batches == 1 else 0
        return [
            SimpleNamespace(
                prompt_token_ids=ids,
                num_cached_tokens=cached,
                prompt_logprobs=[
                    None,
                    *({token: SimpleNamespace(logprob=-token / 100)} for token in ids[1 + cached :]),
                ],
                outputs=[SimpleNamespace(finish_reason="abort" if index in self.aborted else "length")],
            )
            for index, ids in enumerate(self.read)
        ]


@pytest.fixture
def without_readouts(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(_engine: object, outputs: list[Any]) -> None:
        raise ReadoutUnavailable("2 of 2 readouts cannot be given.", [[None] for _ in outputs])

    monkeypatch.setattr(vllm_steer, "steered", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(vllm_steer, "collect_readouts", unavailable, raising=False)


@pytest.mark.usefixtures("without_readouts")
def test_a_lost_readout_keeps_the_log_likelihood_and_tells_the_user() -> None:
    heard = Heard()
    rows = [FinishedRow([10, 20], [1, 3], 0, "kind"), FinishedRow([10], [5], 0, "kind")]
    got = reread(FixedEngine(), rows, max_model_len=64, progress=heard)  # type: ignore[arg-type]
    assert [result.projection for result in got] == [None, None]
    assert [result.log_likelihood for result in got] == [pytest.approx(-0.02), pytest.approx(-0.05)]
    assert "2 of 2 readouts" in heard.warnings[0]


@pytest.mark.usefixtures("without_readouts")
def test_a_row_the_engine_gave_up_has_neither_number() -> None:
    rows = [FinishedRow([10], [1], 0, "kind"), FinishedRow([10], [5], 0, "kind")]
    got = reread(FixedEngine(aborted=(0,)), rows, max_model_len=64, progress=Heard())  # type: ignore[arg-type]
    assert got[0] == Reread(None, None)
    assert got[1].log_likelihood == pytest.approx(-0.05)


def test_rows_without_a_token_to_read_never_reach_the_engine() -> None:
    engine = FixedEngine()
    rows = [FinishedRow([10], [], 0, "kind"), FinishedRow([1] * 63, [5], 0, "kind")]
    assert reread(engine, rows, max_model_len=64, progress=Heard()) == [Reread(None, None)] * 2  # type: ignore[arg-type]
    assert engine.read == []


@pytest.mark.usefixtures("without_readouts")
def test_a_row_whose_prompt_was_cached_to_its_end_is_read_again() -> None:
    engine = FixedEngine(cached=2)
    rows = [FinishedRow([10, 20, 30], [1, 3], 0, "kind"), FinishedRow([10, 20], [5, 7], 0, "kind")]
    got = reread(engine, rows, max_model_len=64, progress=Heard())  # type: ignore[arg-type]
    # the first row's first answer token is predicted at 30, which was computed; the second's at 20, which was not
    assert (engine.batches, engine.read) == (2, [[10, 20, 5, 7]])
    assert [result.log_likelihood for result in got] == [pytest.approx(-0.02), pytest.approx(-0.06)]
