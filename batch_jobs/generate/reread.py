"""Reads finished completions again with the unsteered model, for their log-likelihood and their projection onto a
direction.

Steering changes the residual stream in which both are measured, so neither number can come from the pass that generated
the completion. Here the same weights read prompt + completion without steering, one prefill per row, in which rows of
one prompt share its KV blocks. Text that falls apart under a strong α has a low log-likelihood, whatever words it
holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def reread(engine: Engine, rows: Sequence[FinishedRow], *, max_model_len: int, progress: Progress) -> list[Reread]:
    """Read every row's prompt + completion without steering, all in one batch; results in the order of `rows`.

    The engine generates at least one token, so it reads at most `max_model_len` - 1: a longer row loses the end of its
    completion, and its two means are over the rest. Unlike a readout of the generated span, the mean includes the
    completion's last token.

    Raises:
        SteerError: a direction is not registered at its layer, or the layer is not hooked.
    """
    room = max_model_len - 1
    kept = [row.completion_ids[: max(room - len(row.prompt_ids), 0)] for row in rows]
    readable = [index for index, completion in enumerate(kept) if completion]
    results = [Reread(None, None)] * len(rows)
    if not readable:
        return results
    texts = {index: [*rows[index].prompt_ids, *kept[index]] for index in readable}
    results_of = _read(engine, rows, texts, progress=progress)
    # Rows whose completions begin alike can share blocks beyond their prompt, and a cached token has no logprob.
    hidden = {index: texts[index] for index, (output, _) in results_of.items() if _lacks_logprobs(rows[index], output)}
    if hidden:
        results_of |= _read(engine, rows, hidden, progress=progress, from_cache=False)
    for index, (output, readout) in results_of.items():
        results[index] = _result(rows[index], output, readout)
    return results


def _read(
    engine: Engine,
    rows: Sequence[FinishedRow],
    texts: Mapping[int, list[int]],
    *,
    progress: Progress,
    from_cache: bool = True,
) -> dict[int, tuple[Any, Any]]:
    """Index of a row -> its RequestOutput and its readout, None where the engine could not give it.

    Args:
        engine: with the rows' directions registered.
        rows: all rows.
        texts: index of a row -> the tokens to read.
        progress: shows the batch's progress and takes warnings.
        from_cache: take the prompts that rows share, and any other tokens, from the prefix cache.
    """
    from vllm_steer import collect_readouts

    work = Work(len(texts), sum(map(len, texts.values())), max_new_tokens=1)
    requests = [{"prompt_token_ids": text} for text in texts.values()]
    params = [_params(rows[index], from_cache=from_cache) for index in texts]
    with progress.watch(engine, "Reading completions unsteered", work):
        outputs = engine.generate(requests, params, use_tqdm=False)
    try:
        readouts = collect_readouts(engine, outputs)
    except ReadoutUnavailable as error:
        # The log-likelihoods stay valid: the rows concerned get no projection, and the user is warned.
        progress.warn(str(error))
        readouts = error.results
    return {index: (output, samples[0]) for index, output, samples in zip(texts, outputs, readouts, strict=True)}


def _lacks_logprobs(row: FinishedRow, output: Any) -> bool:
    """Whether the cache gave tokens from the prompt's last one on: its logits are those of the first answer token."""
    return (output.num_cached_tokens or 0) >= len(row.prompt_ids)


def _params(row: FinishedRow, *, from_cache: bool) -> Any:
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
        layers=(row.layer,), span="prompt", project=(row.direction,), vectors=False, skip_first=len(row.prompt_ids)
    )
    return steered(reading, [], readout=readout)


def _result(row: FinishedRow, output: Any, readout: Any) -> Reread:
    if output.outputs[0].finish_reason not in ("stop", "length"):
        return Reread(None, None)
    completion = output.prompt_token_ids[len(row.prompt_ids) :]
    # counted from the end: of cached tokens at the beginning there are no logprobs, or meaningless ones
    first = len(output.prompt_logprobs) - len(completion)
    log_likelihood = np.mean(
        [_logprob(output.prompt_logprobs[first + at], token_id) for at, token_id in enumerate(completion)]
    )
    projection = None if readout is None else float(readout.projections[row.direction][row.layer])
    return Reread(float(log_likelihood), projection)


def _logprob(candidates: Mapping[int, Any], token_id: int) -> float:
    """`candidates`: token id -> vLLM's Logprob at one position. The actual token is always among them."""
    logprob: float = candidates[token_id].logprob
    return logprob
