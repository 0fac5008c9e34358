"""Validate a study's directions from the readouts of its texts. No engine is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batch_jobs.config.study import DirectionMethod, Study
from batch_jobs.directions.auroc import Projections
from batch_jobs.directions.baselines import random_baseline
from batch_jobs.directions.extract import study_texts
from batch_jobs.directions.layer_choice import choose_layer
from batch_jobs.directions.left_out import leave_groups_out
from batch_jobs.directions.lexical_ablation import replacements_of
from batch_jobs.directions.methods import Vector, make_directions, mean_difference, mean_residual_norm
from batch_jobs.directions.readout_file import PairReadouts, StudyReadouts, TextSet, text_digest
from batch_jobs.directions.validate_layer import LayerValidation, ValidationError, validate_layer
from batch_jobs.directions.validation_file import (
    AblatedLayer,
    LexicalAblation,
    MethodValidation,
    PoolingValidation,
    Validation,
)
from batch_jobs.directions.word_baselines import (
    TextSides,
    WordBaselines,
    beyond_words,
    score_by_words,
    word_baselines,
)
from batch_jobs.texts.contrastive import Pair, Split
from vllm_steer import Direction


def validate_study(study: Study, readouts: StudyReadouts, split: Split) -> Validation:
    """Validate every direction of the study on its held-out texts, with the baselines to compare against.

    Deterministic: `study.seed` draws the resamples and the random directions.

    Args:
        study: the study.
        readouts: readouts of its texts, from a file of any version.
        split: the pairs that were read, for their words, scenarios and writers.

    Raises:
        ReadoutFileError: the readouts lack a block or a pooling that the study needs.
        StudyError: the readouts give no direction.
        ValidationError: the readouts are not usable, or are those of other texts.
    """
    _check_texts(readouts, split)
    poolings = {skip_first: _pooling(readouts, skip_first) for skip_first in readouts.poolings}
    directions = make_directions(study, readouts)
    methods, layers = {}, {}
    for layer in study.extract.layers:
        by_method = {method: direction for (method, at), direction in directions.items() if at == layer}
        results = {method: _validated(study, readouts, direction) for method, direction in by_method.items()}
        layers[layer] = results["mean_difference"]
        methods[layer] = {
            method: _method(result, by_method[method].vector, by_method["mean_difference"].vector)
            for method, result in results.items()
        }
    places = {layer: (study.skip_first, study.extract.readout_layer(layer)) for layer in layers}
    best_layer, layer_choice = choose_layer(
        {layer: readouts.train(*place) for layer, place in places.items()},
        _sides(split.train),
        [pair.scenario_id for pair in split.train],
    )
    tested, words_alone = _sides(split.test), score_by_words(_sides(split.train), _sides(split.test))
    everything = {layer: readouts.all_pairs(*place) for layer, place in places.items()}
    pairs = (*split.train, *split.test)
    return Validation(
        layers=layers,
        best_layer=best_layer,
        layer_choice=layer_choice,
        words=word_baselines(tested, words_alone),
        beyond_words={
            layer: beyond_words(
                *_projections(readouts.test(*place), directions["mean_difference", layer].vector),
                words_alone,
                resamples=study.validation.bootstrap,
                seed=study.seed,
            )
            for layer, place in places.items()
        },
        left_out_scenarios=leave_groups_out(everything, _sides(pairs), [pair.scenario_id for pair in pairs]),
        left_out_writers=leave_groups_out(everything, _sides(pairs), [pair.source_model for pair in pairs]),
        # steering adds α at the output of block `layer`, even where the direction was read at another block
        mean_residual_norms={
            layer: mean_residual_norm(readouts.train(study.skip_first, layer)) for layer in study.extract.layers
        },
        skip_first=study.skip_first,
        methods=methods,
        pooling=poolings,
        random_baseline={
            layer: random_baseline(
                readouts.test(*places[layer]),
                result.auroc,
                result.separation_in_stds,
                directions=study.validation.random_directions,
                seed=study.seed,
            )
            for layer, result in layers.items()
        },
        ablation=_ablation(study, readouts, split, directions, layers) if study.validation.lexical_ablation else None,
        extra={
            "extract_offset": study.extract.extract_offset,
            "max_tokens": study.extract.max_tokens,
            "train_pairs": len(readouts.texts["train_positive"]),
            "test_pairs": len(readouts.texts["test_positive"]),
            "mean_tokens_per_text": _mean_tokens(readouts),
        },
    )


def _check_texts(readouts: StudyReadouts, split: Split) -> None:
    """Refuse pairs other than those that were read."""
    given: dict[TextSet, list[str]] = {
        "train_positive": [pair.positive for pair in split.train],
        "train_negative": [pair.negative for pair in split.train],
        "test_positive": [pair.positive for pair in split.test],
        "test_negative": [pair.negative for pair in split.test],
    }
    for text_set, texts in given.items():
        if [text.sha256 for text in readouts.texts[text_set]] != [text_digest(text) for text in texts]:
            raise ValidationError(
                f"The {text_set.replace('_', ' ')} texts are not those of the readouts; give the pairs that were read, "
                "or read these (--overwrite)."
            )


def _sides(pairs: Sequence[Pair]) -> TextSides:
    return TextSides(tuple(pair.positive for pair in pairs), tuple(pair.negative for pair in pairs))


def _projections(pairs: PairReadouts, direction_D: Vector) -> tuple[Projections, Projections]:
    along_D = direction_D.astype(np.float64)
    return pairs.positive_ND.astype(np.float64) @ along_D, pairs.negative_ND.astype(np.float64) @ along_D


def _pooling(readouts: StudyReadouts, skip_first: int) -> PoolingValidation:
    blocks, norms = {}, {}
    for block in readouts.blocks:
        train, test = readouts.train(skip_first, block), readouts.test(skip_first, block)
        blocks[block] = validate_layer(block, mean_difference(train), train=train, test=test)
        norms[block] = mean_residual_norm(train)
    return PoolingValidation(skip_first, blocks, norms)


def _validated(study: Study, readouts: StudyReadouts, direction: Direction) -> LayerValidation:
    where = (study.skip_first, study.extract.readout_layer(direction.layer))
    return validate_layer(direction.layer, direction.vector, train=readouts.train(*where), test=readouts.test(*where))


def _method(result: LayerValidation, direction_D: Vector, mean_difference_D: Vector) -> MethodValidation:
    return MethodValidation(
        auroc=result.auroc,
        auroc_low=result.auroc_low,
        auroc_high=result.auroc_high,
        accuracy=result.accuracy,
        accuracy_train_threshold=result.accuracy_train_threshold,
        cosine=float(direction_D @ mean_difference_D),
    )


def _ablation(
    study: Study,
    readouts: StudyReadouts,
    split: Split,
    directions: dict[tuple[DirectionMethod, int], Direction],
    before: dict[int, LayerValidation],
) -> LexicalAblation:
    layers = {}
    for layer, unchanged in before.items():
        where = (study.skip_first, study.extract.readout_layer(layer))
        after = validate_layer(
            layer,
            directions["mean_difference", layer].vector,
            train=readouts.train(*where),
            test=readouts.ablated_test(*where),
        )
        layers[layer] = AblatedLayer(unchanged, after)
    return LexicalAblation(
        keywords=len(replacements_of(study.concept)),
        replacements=tuple(text.replacements for text in readouts.texts["test_positive_ablated"]),
        layers=layers,
        words=_ablated_words(study, readouts, split),
    )


def _ablated_words(study: Study, readouts: StudyReadouts, split: Split) -> WordBaselines | None:
    ablated = tuple(text.text for _, text in study_texts(study, split)["test_positive_ablated"])
    if [text.sha256 for text in readouts.texts["test_positive_ablated"]] != [text_digest(text) for text in ablated]:
        return None
    tested = TextSides(ablated, _sides(split.test).negative)
    return word_baselines(tested, score_by_words(_sides(split.train), tested))


def _mean_tokens(readouts: StudyReadouts) -> float:
    """Mean number of tokens read per text, without the ablated copies."""
    counts = [
        text.num_tokens
        for text_set, texts in readouts.texts.items()
        if text_set != "test_positive_ablated"
        for text in texts
    ]
    return sum(counts) / len(counts)
