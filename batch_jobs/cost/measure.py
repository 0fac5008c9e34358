"""Measure the cost of steering: perplexity of neutral texts, and accuracy on multiple-choice questions.

All conditions run as one batch. A text is scored as if the steered model were generating it: the tokens that the span
means in a generation are steered, by `batch_jobs.engine.scored_spans`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batch_jobs.cost.cost_curve import CostPoint
from batch_jobs.cost.materials import CostMaterials
from batch_jobs.engine.progress import Progress, Work
from batch_jobs.engine.scored_spans import scored_entries
from batch_jobs.engine.start_engine import Engine
from batch_jobs.errors import StudyError
from batch_jobs.rows.grid import Condition
from vllm_steer import Steering


@dataclass(frozen=True)
class _Scored:
    """A text that is scored behind its context, or a context behind which each of some tokens is scored.

    Attributes:
        token_ids: all tokens that are sent, at least one; the context comes first.
        context_len: tokens of the context.
        next_ids: tokens that could follow; if there are any, all tokens that are sent are context.
    """

    token_ids: tuple[int, ...]
    context_len: int
    next_ids: tuple[int, ...] = ()

    @property
    def sampling(self) -> dict[str, Any]:
        """What to ask the engine for."""
        asked = {"logprob_token_ids": list(self.next_ids)} if self.next_ids else {"prompt_logprobs": 0}
        return {"temperature": 0.0, "max_tokens": 1, "flat_logprobs": True, "detokenize": False, **asked}

    def log_likelihoods(self, output: Any) -> list[float]:
        """That of the text, or of each next token.

        Raises:
            StudyError: the request ended with an error.
        """
        sample = output.outputs[0]
        if sample.finish_reason == "error":
            raise StudyError(
                f"Measuring the cost: a request ended with an error ({sample.stop_reason}); use a smaller alpha."
            )
        if self.next_ids:
            return [sample.logprobs[0][token_id].logprob for token_id in self.next_ids]
        positions = range(self.context_len, len(self.token_ids))
        return [math.fsum(output.prompt_logprobs[at][self.token_ids[at]].logprob for at in positions)]


def measure_cost(
    engine: Engine,
    cells: Iterable[Condition],
    materials: CostMaterials,
    *,
    max_model_len: int,
    progress: Progress,
) -> tuple[CostPoint, ...]:
    """Measure the unsteered model and every distinct steering of `cells`, whatever their scenario.

    Args:
        engine: with the directions of `cells` registered.
        cells: conditions; those without steering are one.
        materials: texts and questions.
        max_model_len: the engine's longest sequence, in tokens.
        progress: shows the batch's progress.

    Raises:
        StudyError: a text is longer than the engine's context, or a request ended with an error.
        SteerError: the engine cannot apply a steering.
    """
    from vllm_steer import abandon_requests, steered

    settings: dict[tuple[int, str, float] | None, Condition | None] = {None: None}
    for cell in cells:
        if cell.steered:
            settings.setdefault((cell.layer, cell.direction, cell.alpha), cell)
    texts, questions = _tokenised(engine, materials)
    scored = [*texts, *(one for question in questions for one in question)]
    longest = max(len(one.token_ids) for one in scored)
    if longest >= max_model_len:
        raise StudyError(
            f"A text of the cost section has {longest} tokens; allowed: less than max_model_len, "
            f"{max_model_len}. Shorten it or raise max_model_len."
        )
    requests, params = [], []
    for setting in settings.values():
        entries = [] if setting is None else [_entry(setting)]
        for one in scored:
            requests.append({"prompt_token_ids": list(one.token_ids)})
            params.append(steered(one.sampling, scored_entries(entries, one.context_len, len(one.token_ids))))
    tokens = sum(len(request["prompt_token_ids"]) for request in requests)
    try:
        with progress.watch(engine, "Measuring the cost", Work(len(requests), tokens, 1)):
            outputs = engine.generate(requests, params, use_tqdm=False)
    finally:
        # after a step that raised, the next batch would run, and return, the requests left in the engine
        abandon_requests(engine)
    found = (
        number
        for one, output in zip(scored * len(settings), outputs, strict=True)
        for number in one.log_likelihoods(output)
    )
    return tuple(_point(setting, texts, materials, found) for setting in settings.values())


def _entry(cell: Condition) -> Steering:
    return Steering(cell.direction, cell.alpha, layer=cell.layer, op=cell.op, span=cell.span)


def _tokenised(engine: Engine, materials: CostMaterials) -> tuple[list[_Scored], list[list[_Scored]]]:
    tokenizer = engine.get_tokenizer()
    # the token before a text that has no context, so that its first word is scored too
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = [_Scored((prefix, *ids(text)), 1) for text in materials.texts]
    questions = []
    for choice in materials.choices:
        start, options = (prefix, *ids(choice.start)), [tuple(ids(option)) for option in choice.options]
        if len(set(options)) == len(options) and all(len(option) == 1 for option in options):
            # one pass over the question has the logits of all options
            questions.append([_Scored(start, len(start), next_ids=tuple(option[0] for option in options))])
        else:
            questions.append([_Scored((*start, *option), len(start)) for option in options])
    return texts, questions


def _point(
    cell: Condition | None,
    texts: Sequence[_Scored],
    materials: CostMaterials,
    found: Iterator[float],
) -> CostPoint:
    total = math.fsum(next(found) for _ in texts)
    tokens = sum(len(one.token_ids) - one.context_len for one in texts)
    right = 0
    for choice in materials.choices:
        scores = [next(found) for _ in choice.options]
        right += scores.index(max(scores)) == choice.right
    return CostPoint(
        layer=None if cell is None else cell.layer,
        direction=None if cell is None else cell.direction,
        alpha=0.0 if cell is None else cell.alpha,
        alpha_residual_norm=0.0 if cell is None else cell.alpha_residual_norm,
        perplexity=math.exp(-total / tokens),
        choice_accuracy=right / len(materials.choices),
        tokens=tokens,
        choices=len(materials.choices),
    )
