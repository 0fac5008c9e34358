"""Validate a study's directions from the readouts of its texts. No engine is needed."""

from __future__ import annotations

from batch_jobs.config.study import DirectionMethod, Study
from batch_jobs.directions.baselines import random_baseline
from batch_jobs.directions.lexical_ablation import replacements_of
from batch_jobs.directions.methods import Vector, make_directions, mean_difference, mean_residual_norm
from batch_jobs.directions.readout_file import PairReadouts, StudyReadouts
from batch_jobs.directions.validate_layer import LayerValidation, best_layer, validate_layer
from batch_jobs.directions.validation_file import (
    AblatedLayer,
    LexicalAblation,
    MethodValidation,
    PoolingValidation,
    Validation,
)
from vllm_steer import Direction


def validate_study(study: Study, readouts: StudyReadouts) -> Validation:
    """Validate every direction of the study on its held-out texts, with the baselines to compare against.

    Deterministic: `study.seed` draws the resamples and the random directions.

    Raises:
        ReadoutFileError: the readouts lack a block or a pooling that the study needs.
        StudyError: the readouts give no direction.
        ValidationError: the readouts are not usable.
    """
    poolings = {skip_first: _pooling(study, readouts, skip_first) for skip_first in readouts.poolings}
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
    return Validation(
        layers=layers,
        best_layer=best_layer(layers),
        # steering adds α at the output of block `layer`, even where the direction was read at another block
        mean_residual_norms={
            layer: mean_residual_norm(readouts.train(study.skip_first, layer)) for layer in study.extract.layers
        },
        skip_first=study.skip_first,
        methods=methods,
        pooling=poolings,
        random_baseline={
            layer: random_baseline(
                readouts.test(study.skip_first, study.extract.readout_layer(layer)),
                result.auroc,
                directions=study.validation.random_directions,
                seed=study.seed,
            )
            for layer, result in layers.items()
        },
        ablation=_ablation(study, readouts, directions, layers) if study.validation.lexical_ablation else None,
        extra={
            "extract_offset": study.extract.extract_offset,
            "max_tokens": study.extract.max_tokens,
            "train_pairs": len(readouts.texts["train_positive"]),
            "test_pairs": len(readouts.texts["test_positive"]),
            "mean_tokens_per_text": _mean_tokens(readouts),
        },
    )


def _pooling(study: Study, readouts: StudyReadouts, skip_first: int) -> PoolingValidation:
    blocks, norms = {}, {}
    for block in readouts.blocks:
        train, test = readouts.train(skip_first, block), readouts.test(skip_first, block)
        blocks[block] = _validate(study, block, mean_difference(train), train, test)
        norms[block] = mean_residual_norm(train)
    return PoolingValidation(skip_first, blocks, norms)


def _validated(study: Study, readouts: StudyReadouts, direction: Direction) -> LayerValidation:
    where = (study.skip_first, study.extract.readout_layer(direction.layer))
    return _validate(study, direction.layer, direction.vector, readouts.train(*where), readouts.test(*where))


def _validate(
    study: Study, layer: int, direction_D: Vector, train: PairReadouts, test: PairReadouts
) -> LayerValidation:
    return validate_layer(
        layer, direction_D, train=train, test=test, bootstrap=study.validation.bootstrap, seed=study.seed
    )


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
    directions: dict[tuple[DirectionMethod, int], Direction],
    before: dict[int, LayerValidation],
) -> LexicalAblation:
    layers = {}
    for layer, unchanged in before.items():
        where = (study.skip_first, study.extract.readout_layer(layer))
        after = _validate(
            study,
            layer,
            directions["mean_difference", layer].vector,
            readouts.train(*where),
            readouts.ablated_test(*where),
        )
        layers[layer] = AblatedLayer(unchanged, after)
    return LexicalAblation(
        keywords=len(replacements_of(study.concept)),
        replacements=tuple(text.replacements for text in readouts.texts["test_positive_ablated"]),
        layers=layers,
    )


def _mean_tokens(readouts: StudyReadouts) -> float:
    """Mean number of tokens read per text, without the ablated copies."""
    counts = [
        text.num_tokens
        for text_set, texts in readouts.texts.items()
        if text_set != "test_positive_ablated"
        for text in texts
    ]
    return sum(counts) / len(counts)
