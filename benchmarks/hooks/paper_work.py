"""The paper's work with the bundled texts: its smallest grid (75 rows) and its extraction (100 texts).

A model without a tokenizer gets random token ids of the same lengths; no measurement depends on the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig, AutoTokenizer

from batch_jobs.config.study import SplitSizes
from batch_jobs.texts.contrastive import Pair, load_scenarios, load_split, steering_prompts
from batch_jobs.texts.prompts import text_prompt

SCENARIOS = ("food_delivery", "the_listener", "the_protector")
ALPHAS = (0.0, 1.0, 3.0, 5.0, 10.0)
SAMPLES = 5
WORDS_A_TEXT = 300
MAX_TEXT_TOKENS = 512
_PROMPT_TOKENS = (110, 139, 164)  # of the prompts in the demo model's tokenizer; below, the mean of the texts
_TEXT_TOKENS = 368


@dataclass(frozen=True)
class Row:
    """One completion of the grid."""

    prompt: tuple[int, ...]
    alpha: float


@dataclass(frozen=True)
class PaperWork:
    """The rows to generate and the texts to read, as token ids.

    Attributes:
        rows: 3 scenarios × 5 α × 5 samples, with the samples of a condition next to each other.
        texts: 100 texts to read.
        direction_D: unit vector (D,) to steer along.
    """

    rows: tuple[Row, ...]
    texts: tuple[tuple[int, ...], ...]
    direction_D: npt.NDArray[np.float32]


def has_tokenizer(model: str) -> bool:
    """Whether the checkpoint in folder `model` has a tokenizer."""
    return (Path(model) / "tokenizer_config.json").exists()


def paper_work(model: str) -> PaperWork:
    """The work for the checkpoint in folder `model`; the same at every call."""
    config = AutoConfig.from_pretrained(model)
    draw = np.random.default_rng(0)
    if has_tokenizer(model):
        prompts, texts = _tokenised(model)
    else:
        prompts = [tuple(draw.integers(config.vocab_size, size=length).tolist()) for length in _PROMPT_TOKENS]
        texts = [tuple(draw.integers(config.vocab_size, size=_TEXT_TOKENS).tolist()) for _ in range(100)]
    rows = tuple(Row(prompt, alpha) for prompt in prompts for alpha in ALPHAS for _ in range(SAMPLES))
    direction_D = draw.standard_normal(config.hidden_size)
    return PaperWork(rows, tuple(texts), (direction_D / np.linalg.norm(direction_D)).astype(np.float32))


def _tokenised(model: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    scenarios = load_scenarios(None)
    prompts = [text_prompt(tokenizer, steering_prompts(scenarios[name])[0]).token_ids for name in SCENARIOS]
    split = load_split(None, SplitSizes())
    pairs: Sequence[Pair] = (*split.train, *split.test)
    texts = []
    for side in ([pair.positive for pair in pairs], [pair.negative for pair in pairs]):
        words = " ".join(side).split()
        step = len(words) // len(side)
        # The bundled texts are a third as long as the paper's, so each is extended with the next ones.
        texts += [" ".join((words * 2)[start * step : start * step + WORDS_A_TEXT]) for start in range(len(side))]
    return prompts, [text_prompt(tokenizer, text, max_tokens=MAX_TEXT_TOKENS).token_ids for text in texts]
