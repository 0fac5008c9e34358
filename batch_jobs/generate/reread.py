"""Reads finished completions again with the unsteered model, for their log-likelihood and their projection onto a
direction.

Steering changes the residual stream in which both are measured, so neither number can come from the pass that generated
the completion. Here the same weights read prompt + completion without steering, one prefill per row, in which rows of
one prompt share its KV blocks. Text that falls apart under a strong α has a low log-likelihood, whatever words it
holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batch_jobs.engine.progress import Progress, Work
from batch_jobs.engine.start_engine import Engine
from vllm_steer.errors import ReadoutUnavailable


@dataclass(frozen=True)
class FinishedRow:
    """A completion as its generated token ids, never as text: tokenising the text again may split it differently."""

    prompt_ids: Sequence[int]
    """At least one."""
    completion_ids: Sequence[int]
    """All generated ids, special ones included: a generated end-of-sequence token counts like any other, also in both
    means of `Reread`."""
    layer: int
    direction: str
    """Name of a registered direction at `layer`."""


@dataclass(frozen=True)
class Reread:
    """Result of the unsteered pass for one completion. Both fields are None if there was no token to read or the engine
    ended the row early."""

    log_likelihood: float | None
    """Mean over the completion's tokens of ln p(token | prompt, tokens before it); <= 0. Perplexity is exp of its
    negative. The study's temperature and top_p do not affect it."""
    projection: float | None
    """Projection onto the row's direction of the mean, over the completion's tokens, of the residual stream at the
    output of the row's layer. Also None if the engine could not give the readout."""


@dataclass(frozen=True)
class _Text:
    """What is read once, for all rows that have it and ask for the same direction: the baselines of several layers."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    direction: str

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.completion_ids]


def reread(engine: Engine, rows: Sequence[FinishedRow], *, max_model_len: int, progress: Progress) -> list[Reread]:
    """Read every row's prompt + completion without steering, all in one batch; results in the order of `rows`.

    The engine generates at least one token, so it reads at most `max_model_len` - 1: a longer row loses the end of its
    completion, and its two means are over the rest. Unlike a readout of the generated span, the mean includes the
    completion's last token.

    Raises:
        SteerError: a direction is not registered at its layer, or the layer is not hooked.
    """
    room = max_model_len - 1
    text_of_row: dict[int, _Text] = {}
    layers: dict[_Text, set[int]] = {}
    for index, row in enumerate(rows):
        if kept := row.completion_ids[: max(room - len(row.prompt_ids), 0)]:
            text = text_of_row[index] = _Text(tuple(row.prompt_ids), tuple(kept), row.direction)
            layers.setdefault(text, set()).add(row.layer)
    results = [Reread(None, None)] * len(rows)
    if not layers:
        return results
    read = _read(engine, layers, progress=progress)
    # Texts that begin alike can share blocks beyond their prompt, and a cached token has no logprob.
    hidden = {text: layers[text] for text, (output, _) in read.items() if _lacks_logprobs(text, output)}
    if hidden:
        read |= _read(engine, hidden, progress=progress, from_cache=False)
    for index, text in text_of_row.items():
        results[index] = _result(text, rows[index].layer, *read[text])
    return results


def _read(
    engine: Engine, layers: Mapping[_Text, Iterable[int]], *, progress: Progress, from_cache: bool = True
) -> dict[_Text, tuple[Any, Any]]:
    """Text -> its RequestOutput and its readout, None where the engine could not give it.

    Args:
        engine: with the directions of the texts registered at their layers.
        layers: text -> the layers to read it at.
        progress: shows the batch's progress and takes warnings.
        from_cache: take the prompts that texts share, and any other tokens, from the prefix cache.
    """
    from vllm_steer import collect_readouts

    requests = [{"prompt_token_ids": text.token_ids} for text in layers]
    work = Work(len(requests), sum(len(one["prompt_token_ids"]) for one in requests), max_new_tokens=1)
    params = [_params(text, sorted(read_at), from_cache=from_cache) for text, read_at in layers.items()]
    with progress.watch(engine, "Reading completions unsteered", work):
        outputs = engine.generate(requests, params, use_tqdm=False)
    try:
        readouts = collect_readouts(engine, outputs)
    except ReadoutUnavailable as error:
        # The log-likelihoods stay valid: the rows concerned get no projection, and the user is warned.
        progress.warn(str(error))
        readouts = error.results
    return {text: (output, samples[0]) for text, output, samples in zip(layers, outputs, readouts, strict=True)}


def _lacks_logprobs(text: _Text, output: Any) -> bool:
    """Whether the cache gave tokens from the prompt's last one on: its logits are those of the first answer token."""
    return (output.num_cached_tokens or 0) >= len(text.prompt_ids)


def _params(text: _Text, layers: Sequence[int], *, from_cache: bool) -> Any:
    from vllm_steer import Readout, steered

    reading = {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,  # for the prompt's own tokens, without alternatives
        "flat_logprobs": True,  # lists of numbers instead of an object and a dict per token
        "detokenize": False,  # the text is not used
        # vLLM skips the cache for prompt logprobs unless told otherwise, since cached tokens have none: those of the
        # row's own prompt are not used
        "skip_reading_prefix_cache": not from_cache,
    }
    # The whole sequence is the engine's prompt; skip_first leaves out the row's own prompt.
    readout = Readout(
        layers=tuple(layers), span="prompt", project=(text.direction,), vectors=False, skip_first=len(text.prompt_ids)
    )
    return steered(reading, [], readout=readout)


def _result(text: _Text, layer: int, output: Any, readout: Any) -> Reread:
    if output.outputs[0].finish_reason not in ("stop", "length"):
        return Reread(None, None)
    # counted from the end: of cached tokens at the beginning there are no logprobs, or meaningless ones
    first = len(output.prompt_logprobs) - len(text.completion_ids)
    log_likelihood = np.mean(
        [_logprob(output.prompt_logprobs[first + at], token_id) for at, token_id in enumerate(text.completion_ids)]
    )
    projection = None if readout is None else float(readout.projections[text.direction][layer])
    return Reread(float(log_likelihood), projection)


def _logprob(candidates: Mapping[int, Any], token_id: int) -> float:
    """`candidates`: token id -> vLLM's Logprob at one position. The actual token is always among them."""
    logprob: float = candidates[token_id].logprob
    return logprob
