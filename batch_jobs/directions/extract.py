"""Read texts with the engine: the pooled residual stream of each text at every requested layer.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.lexical_ablation import AblatedText, ablate_text, replacements_of
from batch_jobs.directions.readout_file import ReadoutKey, ReadText, StudyReadouts, TextSet, text_digest
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

    Each request also generates one token, which is discarded. The texts get no chat template. Every text is read once,
    without the tokens that the largest pooling leaves out; those are read as a text of their own, once for all texts
    that begin with them, and their sum is added for the smaller poolings. Taking them away from a mean over all tokens
    instead would lose digits, since an attention sink is so much larger than the other tokens.

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
    skipped = max(poolings)
    heads = sorted({prompt.token_ids[:skipped] for prompt in prompts}) if skipped else []
    smaller = sorted({skip_first for skip_first in poolings if skip_first < skipped})
    readings = [(text, prompt.token_ids, skipped) for text, prompt in zip(texts, prompts, strict=True)]
    readings += [
        (f"the first {skipped} tokens of a text", head, skip_first) for skip_first in smaller for head in heads
    ]
    params = {
        skip_first: steered(
            {"max_tokens": 1, "temperature": 0.0}, [], readout=Readout(tuple(layers), skip_first=skip_first)
        )
        for skip_first in (skipped, *smaller)
    }
    tokens = sum(len(token_ids) for _, token_ids, _ in readings)
    with progress.watch(engine, "Reading texts", Work(len(readings), tokens, 1)):
        outputs = engine.generate(
            [{"prompt_token_ids": list(token_ids)} for _, token_ids, _ in readings],
            [params[skip_first] for *_, skip_first in readings],
            use_tqdm=False,
        )
    readouts = [
        _only(samples, text) for samples, (text, *_) in zip(collect_readouts(engine, outputs), readings, strict=True)
    ]
    rests = readouts[: len(texts)]
    of_head = {
        (skip_first, head): readout
        for readout, (_, head, skip_first) in zip(readouts[len(texts) :], readings[len(texts) :], strict=True)
    }
    by_pooling = {}
    for skip_first in poolings:
        parts = [
            [rest] if skip_first == skipped else [of_head[skip_first, prompt.token_ids[:skipped]], rest]
            for prompt, rest in zip(prompts, rests, strict=True)
        ]
        by_pooling[skip_first] = {layer: np.stack([_mean(several, layer) for several in parts]) for layer in layers}
    return TextReadouts(by_pooling, tuple(len(prompt.token_ids) for prompt in prompts))


def _mean(parts: Sequence[Any], layer: int) -> npt.NDArray[np.float32]:
    """(D,) mean over the tokens of several readouts together."""
    if len(parts) == 1:
        return np.asarray(parts[0].mean[layer], np.float32)
    total_D = sum(part.num_tokens * part.mean[layer].astype(np.float64) for part in parts)
    return np.asarray(total_D / sum(part.num_tokens for part in parts), np.float32)


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
                sha256=text_digest(ablated.text),
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
        # only the positive side, as in the paper: the other side has almost none of the words
        words = replacements_of(study.concept)
        sets["test_positive_ablated"] = [
            (pair, ablate_text(pair.positive, seed=study.seed, text_id=pair.pair_id, words=words))
            for pair in split.test
        ]
    return sets


def _only(samples: Sequence[Any], text: str) -> Any:
    readout = samples[0]
    if readout is None:
        raise StudyError(f"The engine returned no readout for the text {text[:60]!r}; run the study again.")
    return readout
