"""Readouts of texts, and the directions and norms made from them.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from batch_jobs.contrastive import Pair
from batch_jobs.engine import Engine
from batch_jobs.progress import Work, engine_progress
from batch_jobs.prompts import text_prompt
from batch_jobs.study import StudyError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextReadouts:
    """Readouts of N texts."""

    by_layer: dict[int, Floats]
    """Layer -> (N, D) float32: each text's mean over its tokens of the output of that block."""
    num_tokens: tuple[int, ...]
    """Tokens that entered each text's mean (those skipped are not among them)."""


def extract_readouts(
    engine: Engine,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    skip_first: int,
    max_tokens: int,
    console: Console,
) -> TextReadouts:
    """Read all texts at all layers in one batch: one prefill a text, its last step's token thrown away.

    The texts are read alone, without a chat template, each cut to `max_tokens` tokens; `skip_first` leading
    tokens stay out of the mean. `layers` must be hooked. Raises StudyError when a text has no token left
    after the skip, or the engine returns no readout for one; SteerError when a layer is not hooked.
    """
    from vllm_steer import Readout, collect_readouts, steered

    tokenizer = engine.get_tokenizer()
    prompts = [text_prompt(tokenizer, text, max_tokens=max_tokens) for text in texts]
    for prompt in prompts:
        if len(prompt.token_ids) <= skip_first:
            raise StudyError(
                f"The text {prompt.text[:60]!r} has {len(prompt.token_ids)} tokens and skip_first leaves out "
                f"{skip_first} of them; lower skip_first or drop the text."
            )
    params = steered(
        {"max_tokens": 1, "temperature": 0.0},
        [],
        readout=Readout(layers=tuple(layers), skip_first=skip_first),
    )
    work = Work(len(prompts), sum(len(prompt.token_ids) for prompt in prompts), max_new_tokens=1)
    with engine_progress(engine, console, "Reading texts", work):
        outputs = engine.generate([prompt.request for prompt in prompts], [params] * len(prompts), use_tqdm=False)
    readouts = [_only(samples, texts[index]) for index, samples in enumerate(collect_readouts(engine, outputs))]
    return TextReadouts(
        by_layer={
            layer: np.stack([readout.mean[layer] for readout in readouts]).astype(np.float32, copy=False)
            for layer in layers
        },
        num_tokens=tuple(readout.num_tokens for readout in readouts),
    )


@dataclass(frozen=True)
class PairReadouts:
    """Readouts of the two sides of the same pairs at one layer, row for row."""

    empathic_ND: Floats
    non_empathic_ND: Floats


def pair_texts(pairs: Sequence[Pair]) -> list[str]:
    """The empathic texts, then the non-empathic ones, both in the order of the pairs; `pair_readouts` undoes
    it."""
    return [pair.empathic for pair in pairs] + [pair.non_empathic for pair in pairs]


def pair_readouts(readouts_ND: Floats) -> PairReadouts:
    """Halve the (2N, D) readouts of `pair_texts` into the two sides. Raises StudyError for an odd number of
    rows."""
    if len(readouts_ND) % 2:
        raise StudyError(f"Got {len(readouts_ND)} readouts for pairs of texts; the number must be even.")
    half = len(readouts_ND) // 2
    return PairReadouts(readouts_ND[:half], readouts_ND[half:])


def mean_difference(empathic_ND: npt.ArrayLike, non_empathic_ND: npt.ArrayLike) -> Floats:
    """Unit direction (D,) float32 from the non-empathic to the empathic class mean (paper, equation 1).

    Means and the norm are taken in float64. The two N may differ. Raises StudyError for a wrong shape, a
    value that is not finite, or class means that are equal.
    """
    empathic, non_empathic = (np.asarray(side, dtype=np.float64) for side in (empathic_ND, non_empathic_ND))
    if empathic.ndim != 2 or non_empathic.ndim != 2 or empathic.shape[1:] != non_empathic.shape[1:]:
        raise StudyError(
            f"Got readouts of shapes {empathic.shape} and {non_empathic.shape}; both must be (N, D) with the same D."
        )
    if not len(empathic) or not len(non_empathic):
        raise StudyError("One class has no readouts; a mean difference needs at least one text on each side.")
    difference = empathic.mean(axis=0) - non_empathic.mean(axis=0)
    if not np.isfinite(difference).all():
        raise StudyError("The readouts hold NaN or infinity; check the model's dtype (float16 overflows in some).")
    norm = float(np.linalg.norm(difference))
    if norm == 0.0:
        raise StudyError(
            "Both classes have the same mean readout, so there is no direction; check that the texts differ."
        )
    direction: Floats = (difference / norm).astype(np.float32)
    return direction


def mean_residual_norm(readouts_ND: npt.ArrayLike) -> float:
    """The unit in which a study states α as `residual_norm`: the mean over texts of the L2 norm of the text's
    readout.

    (N, D) readouts of the train texts, both classes, at the output of the steered layer. It is the norm of
    each text's *mean* vector, with `skip_first` applied, and so smaller than the mean norm of single tokens.
    Raises StudyError when it is not a positive finite number.
    """
    norm = float(np.linalg.norm(np.asarray(readouts_ND, dtype=np.float64), axis=1).mean())
    if not np.isfinite(norm) or norm <= 0.0:
        raise StudyError(f"The mean residual norm came out as {norm}; it must be positive, so check the readouts.")
    return norm


def _only(samples: Sequence[Any], text: str) -> Any:
    readout = samples[0]
    if readout is None:
        raise StudyError(f"The engine returned no readout for the text {text[:60]!r}; run the study again.")
    return readout
