"""Read texts with the engine: the pooled residual stream of each text at every requested layer.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.lexical_ablation import AblatedText, ablate_text
from batch_jobs.directions.readout_file import ReadoutKey, ReadText, StudyReadouts, TextSet
from batch_jobs.engine.progress import Progress, Work
from batch_jobs.engine.start_engine import Engine
from batch_jobs.texts.contrastive import Pair, Split
from batch_jobs.texts.prompts import text_prompt


@dataclass(frozen=True)
class TextReadouts:
    """Readouts of N texts."""

    by_pooling: dict[int, dict[int, npt.NDArray[np.float32]]]
    """`skip_first` -> layer -> (N, D) float32: the output of that block, averaged over each text's tokens without the
    first `skip_first`."""
    num_tokens: tuple[int, ...]
    """Tokens of each text that were read, skipped ones included."""


def extract_readouts(
    engine: Engine,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    poolings: Sequence[int],
    max_tokens: int,
    progress: Progress,
) -> TextReadouts:
    """Read all texts at all layers under all poolings in one batch.

    Each request also generates one token, which is discarded. The texts get no chat template. Each pooling takes a
    request, and so a prefill, per text. It would be cheaper to read the first tokens alone and subtract them from the
    mean of all, but a token read alone differs in its last bits from the same token read in its text, and an attention
    sink is so much larger than the other tokens that these bits would show.

    Args:
        engine: an engine with a hook at each of `layers`.
        texts: the texts to read.
        layers: decoder blocks to read, 0-based.
        poolings: `skip_first` values: how many leading tokens the mean leaves out.
        max_tokens: each text is cut to this many tokens.
        progress: shows the batch's progress.

    Raises:
        StudyError: a skip leaves a text without tokens, or the engine returns no readout for a text.
        SteerError: a layer is not hooked.
    """
    from vllm_steer import Readout, collect_readouts, steered

    tokenizer = engine.get_tokenizer()
    prompts = [text_prompt(tokenizer, text, max_tokens=max_tokens) for text in texts]
    for prompt in prompts:
        if len(prompt.token_ids) <= max(poolings):
            raise StudyError(
                f"The text {prompt.text[:60]!r} has {len(prompt.token_ids)} tokens and skip_first leaves out "
                f"{max(poolings)} of them; lower skip_first or drop the text."
            )
    requests, params = [], []
    for skip_first in poolings:
        readout = Readout(layers=tuple(layers), skip_first=skip_first)
        requests += [prompt.request for prompt in prompts]
        params += [steered({"max_tokens": 1, "temperature": 0.0}, [], readout=readout)] * len(prompts)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    with progress.watch(engine, "Reading texts", Work(len(requests), tokens * len(poolings), 1)):
        outputs = engine.generate(requests, params, use_tqdm=False)
    readouts = [
        _only(samples, texts[index % len(texts)]) for index, samples in enumerate(collect_readouts(engine, outputs))
    ]
    by_pooling = {}
    for place, skip_first in enumerate(poolings):
        members = readouts[place * len(texts) : (place + 1) * len(texts)]
        by_pooling[skip_first] = {
            layer: np.stack([readout.mean[layer] for readout in members]).astype(np.float32, copy=False)
            for layer in layers
        }
    return TextReadouts(by_pooling, tuple(len(prompt.token_ids) for prompt in prompts))


def read_study_texts(
    engine: Engine, study: Study, split: Split, *, num_layers: int, progress: Progress
) -> StudyReadouts:
    """Read all train and test texts of the study in one batch.

    The texts are read at all hooked layers of a model of `num_layers` blocks, under two poolings to compare: the mean
    over all tokens, and the mean without the first `study.skip_first` (the first one where that is 0).

    Raises:
        StudyError: the model lacks a layer of the study, or as for `extract_readouts`.
        SteerError: a layer is not hooked.
    """
    sets = study_texts(study, split)
    layers = study.hooked_layers(num_layers)
    poolings = (0, study.skip_first or 1)
    everything = [ablated for members in sets.values() for _, ablated in members]
    read = extract_readouts(
        engine,
        [ablated.text for ablated in everything],
        layers,
        poolings=poolings,
        max_tokens=study.extract.max_tokens,
        progress=progress,
    )
    texts: dict[TextSet, tuple[ReadText, ...]] = {}
    arrays = {}
    start = 0
    for text_set, members in sets.items():
        rows = slice(start, start + len(members))
        start = rows.stop
        texts[text_set] = tuple(
            ReadText(
                pair_id=pair.pair_id,
                sha256=hashlib.sha256(ablated.text.encode()).hexdigest(),
                num_tokens=num_tokens,
                replacements=ablated.replacements,
            )
            for (pair, ablated), num_tokens in zip(members, read.num_tokens[rows], strict=True)
        )
        for skip_first in poolings:
            for layer in layers:
                arrays[ReadoutKey(text_set, skip_first, layer)] = read.by_pooling[skip_first][layer][rows]
    return StudyReadouts(texts, arrays)


def study_texts(study: Study, split: Split) -> Mapping[TextSet, Sequence[tuple[Pair, AblatedText]]]:
    """Text set -> its texts, each with its pair. Only the texts of the ablated set are changed."""
    sets: dict[TextSet, list[tuple[Pair, AblatedText]]] = {
        "train_positive": [(pair, AblatedText(pair.positive, 0)) for pair in split.train],
        "train_negative": [(pair, AblatedText(pair.negative, 0)) for pair in split.train],
        "test_positive": [(pair, AblatedText(pair.positive, 0)) for pair in split.test],
        "test_negative": [(pair, AblatedText(pair.negative, 0)) for pair in split.test],
    }
    if study.validation.lexical_ablation:
        # only the positive side, as in the paper: the other side has almost no empathy words
        sets["test_positive_ablated"] = [
            (pair, ablate_text(pair.positive, seed=study.seed, text_id=pair.pair_id)) for pair in split.test
        ]
    return sets


def _only(samples: Sequence[Any], text: str) -> Any:
    readout = samples[0]
    if readout is None:
        raise StudyError(f"The engine returned no readout for the text {text[:60]!r}; run the study again.")
    return readout
