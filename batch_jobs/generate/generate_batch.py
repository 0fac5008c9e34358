"""Runs rows of a grid through one engine, all conditions mixed in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from batch_jobs.config.steering import controlled_direction
from batch_jobs.config.study import Study, StudyError
from batch_jobs.engine.progress import Progress, Work
from batch_jobs.engine.start_engine import Engine
from batch_jobs.files.documents import has_utf8_form
from batch_jobs.generate.reread import FinishedRow, Reread, reread
from batch_jobs.rows.grid import Row
from batch_jobs.rows.store import Generation
from batch_jobs.texts.contrastive import Scenario
from batch_jobs.texts.prompts import Prompt
from batch_jobs.texts.study_prompts import study_prompts, too_long
from batch_jobs.texts.thought import OPENING, split_thought
from vllm_steer.errors import ReadoutUnavailable


@dataclass(frozen=True)
class SteeringPrompts:
    """The steering prompts of a grid, and their unsteered projections onto each layer's direction."""

    prompts: dict[str, tuple[Prompt, ...]]
    """Scenario id -> its prompts, in the scenario's order."""
    projections: dict[str, tuple[dict[tuple[str, int], float], ...]]
    """Scenario id -> for each prompt (direction, steered layer) -> projection of the unsteered prompt's readout."""

    def of(self, row: Row) -> Prompt:
        """The prompt of a row: its scenario's prompts take turns over the samples."""
        prompts = self.prompts[row.condition.scenario_id]
        return prompts[row.sample % len(prompts)]

    def projection(self, row: Row) -> float:
        """The unsteered projection of the row's prompt; see `projected_on`."""
        projections = self.projections[row.condition.scenario_id]
        return projections[row.sample % len(projections)][projected_on(row), row.condition.layer]


@dataclass(frozen=True)
class Origin:
    """The model revision and direction hashes that a completion is recorded with."""

    model_revision: str | None
    direction_hashes: Mapping[tuple[str, int], str]
    """(direction, layer) -> content hash."""


def prepare_prompts(
    engine: Engine, study: Study, scenarios: Mapping[str, Scenario], *, progress: Progress
) -> SteeringPrompts:
    """Tokenise each scenario's steering prompt and read it once, unsteered, at the steered layers.

    The directions must be registered. Warns when the chat template opens a thought.

    Raises:
        StudyError: the chat template is absent or refuses the study's variables, a prompt and its completion do not
            fit max_model_len, or the engine returned no readout for a prompt.
    """
    from vllm_steer import collect_readouts, steered

    prompts = study_prompts(study, scenarios, engine.get_tokenizer())
    if complaints := too_long(study, prompts):
        raise StudyError(complaints[0])
    if any(prompt.opens_thought for several in prompts.values() for prompt in several):
        progress.warn(
            f"The chat template of {study.model} opens a thought ({OPENING}) that every completion has to close within "
            f"sampling.max_tokens, {study.sampling.max_tokens}; a row that does not has no answer and enters no rate. "
            "If the template can switch thinking off, set chat_template_kwargs (often {enable_thinking: false}); else "
            "raise sampling.max_tokens."
        )
    # a direction of a file may be there at some of the layers only, so layers of unlike directions are read apart
    layers: dict[tuple[str, ...], list[int]] = {}
    for layer in study.steer.layers:
        names = tuple(study.direction_name(entry) for entry in study.steer.directions_at(layer))
        layers.setdefault(names, []).append(layer)
    readings = [
        (scenario, place, steered({"max_tokens": 1, "temperature": 0.0}, [], readout=_unsteered(study, names, members)))
        for names, members in layers.items()
        for scenario, several in prompts.items()
        for place in range(len(several))
    ]
    requests = [prompts[scenario][place].request for scenario, place, _ in readings]
    work = Work(len(requests), sum(len(one["prompt_token_ids"]) for one in requests), max_new_tokens=1)
    with progress.watch(engine, "Reading prompts", work):
        outputs = engine.generate(requests, [params for *_, params in readings], use_tqdm=False)
    projections: dict[str, tuple[dict[tuple[str, int], float], ...]] = {
        scenario: tuple({} for _ in several) for scenario, several in prompts.items()
    }
    for (scenario, place, _), samples in zip(readings, collect_readouts(engine, outputs), strict=True):
        if samples[0] is None:
            raise StudyError(f"The engine returned no readout for the prompt of {scenario}; run the study again.")
        projections[scenario][place].update(
            {
                (name, layer): value
                for name, by_layer in samples[0].projections.items()
                for layer, value in by_layer.items()
            }
        )
    return SteeringPrompts(prompts, projections)


def _unsteered(study: Study, names: tuple[str, ...], layers: Sequence[int]) -> Any:
    from vllm_steer import Readout

    return Readout(layers=tuple(layers), project=names, vectors=False, skip_first=study.skip_first)


def generate_rows(
    engine: Engine,
    study: Study,
    rows: Sequence[Row],
    prompts: SteeringPrompts,
    *,
    origin: Origin,
    attempts: int,
    progress: Progress,
) -> list[Generation]:
    """Generate all rows as one batch, whatever their layers and strengths, and return them in the same order.

    Every row asks for a readout of its generated span at its own layer, projected onto its direction, a control's onto
    the direction it controls; only that scalar leaves the device. With `study.likelihood` the unsteered model then
    reads all completions once more, those of controls only with `steer.controls.likelihood`. A row that the engine
    failed on is returned with its `error`; the others are unaffected. If a step of the engine raises, the exception
    propagates and no unfinished request stays in the engine.
    """
    from vllm_steer import abandon_requests, collect_readouts

    began = datetime.now(UTC)
    requests = [prompts.of(row).request for row in rows]
    work = Work(len(rows), sum(len(request["prompt_token_ids"]) for request in requests), study.sampling.max_tokens)
    # The samples of a condition share the KV blocks of their prompt. A prompt whose KV comes from the cache differs in
    # its last bits from one that is computed, and so may the text: a batch that is run again must not depend on what
    # ran before it, so it begins with an empty cache.
    engine.reset_prefix_cache()
    try:
        with progress.watch(engine, "Generating", work):
            outputs = engine.generate(requests, [row_params(row, study) for row in rows], use_tqdm=False)
        try:
            readouts = collect_readouts(engine, outputs)
        except ReadoutUnavailable as error:
            # The completions stay valid: the rows concerned get no projection, and the user is warned.
            progress.warn(str(error))
            readouts = error.results
        finished = [
            FinishedRow(
                requests[index]["prompt_token_ids"],
                tuple(output.outputs[0].token_ids) if is_read_again(row, study) else (),
                row.condition.layer,
                projected_on(row),
            )
            for index, (row, output) in enumerate(zip(rows, outputs, strict=True))
        ]
        rereads = reread(engine, finished, max_model_len=study.max_model_len, progress=progress)
    finally:
        # after a step that raised, the next batch would run, and return, the requests left in the engine
        abandon_requests(engine)
    return [
        _generation(row, output, samples[0], again, prompts, origin, attempts, began)
        for row, output, samples, again in zip(rows, outputs, readouts, rereads, strict=True)
    ]


def row_params(row: Row, study: Study) -> Any:
    """The row's SamplingParams. The baseline has no steering entry, not one of strength 0: it is a plain vLLM request
    plus a readout."""
    from vllm_steer import Readout, Steering, steered

    cell = row.condition
    entries = []
    if cell.steered:
        entries = [Steering(cell.direction, cell.alpha, layer=cell.layer, op=cell.op, span=cell.span)]
    sampling = {**study.sampling.model_dump(), "seed": row.seed}
    readout = Readout(layers=(cell.layer,), span="generated", project=(projected_on(row),), vectors=False)
    return steered(sampling, entries, readout=readout)


def projected_on(row: Row) -> str:
    """The direction that a row's projections are onto: its own, or the one that it is a control of.

    A control's projection onto itself would say how far it was pushed, which is α.
    """
    return controlled_direction(row.condition.direction) or row.condition.direction


def is_read_again(row: Row, study: Study) -> bool:
    """Whether the unsteered model reads the row's completion once more."""
    if not row.condition.is_control:
        return study.likelihood
    return study.likelihood and study.steer.controls is not None and study.steer.controls.likelihood


def failed_generation(row: Row, prompts: SteeringPrompts, origin: Origin, attempts: int, error: str) -> Generation:
    """The record of a row without a completion; `error` says why it has none."""
    return _record(row, prompts, origin, attempts, started_at=datetime.now(UTC), error=error)


def _generation(
    row: Row,
    output: Any,
    readout: Any,
    again: Reread,
    prompts: SteeringPrompts,
    origin: Origin,
    attempts: int,
    began: datetime,
) -> Generation:
    cell = row.condition
    completion, stats = output.outputs[0], output.metrics
    started_at = datetime.fromtimestamp(stats.arrival_time, UTC) if stats else began
    if completion.finish_reason not in ("stop", "length"):
        reason = "" if completion.stop_reason is None else f": {completion.stop_reason}"
        error = f"the engine ended the row with finish_reason {completion.finish_reason!r}{reason}"
        return _record(row, prompts, origin, attempts, started_at=started_at, error=error)
    if not has_utf8_form(completion.text):
        # vLLM detokenises with the Rust tokenizers, whose strings are UTF-8; a tokenizer written in Python may not
        error = "the tokenizer made text without a UTF-8 form (half of a surrogate pair)"
        return _record(row, prompts, origin, attempts, started_at=started_at, error=error)
    parts = split_thought(completion.text, opened=prompts.of(row).opens_thought)
    projection = None
    # the token of a one-token completion is never fed back, so its generated span is empty
    if readout is not None and readout.num_tokens > 0:
        projection = float(readout.projections[projected_on(row)][cell.layer])
    return _record(
        row,
        prompts,
        origin,
        attempts,
        started_at=started_at,
        thought=parts.thought,
        completion=None if parts.is_open else parts.answer,
        finish_reason=completion.finish_reason,
        completion_tokens=len(completion.token_ids),
        projection_generated=projection,
        projection_unsteered=again.projection,
        log_likelihood=again.log_likelihood,
        seconds=stats.last_token_ts - stats.scheduled_ts if stats and stats.last_token_ts else None,
    )


def _record(
    row: Row,
    prompts: SteeringPrompts,
    origin: Origin,
    attempts: int,
    *,
    started_at: datetime,
    thought: str | None = None,
    completion: str | None = None,
    finish_reason: str | None = None,
    completion_tokens: int | None = None,
    projection_generated: float | None = None,
    projection_unsteered: float | None = None,
    log_likelihood: float | None = None,
    seconds: float | None = None,
    error: str | None = None,
) -> Generation:
    cell = row.condition
    prompt = prompts.of(row)
    return Generation(
        row_id=row.row_id,
        model=cell.model,
        model_revision=origin.model_revision,
        direction=cell.direction,
        direction_hash=origin.direction_hashes[cell.direction, cell.layer],
        layer=cell.layer,
        op=cell.op,
        span=cell.span,
        alpha=cell.alpha,
        alpha_residual_norm=cell.alpha_residual_norm,
        alpha_separation=cell.alpha_separation,
        scenario=cell.scenario_id,
        sample=row.sample,
        seed=row.seed,
        prompt=prompt.text,
        thought=thought,
        completion=completion,
        finish_reason=finish_reason,
        prompt_tokens=len(prompt.token_ids),
        completion_tokens=completion_tokens,
        projection_prompt=prompts.projection(row),
        projection_generated=projection_generated,
        projection_unsteered=projection_unsteered,
        log_likelihood=log_likelihood,
        attempts=attempts,
        started_at=started_at,
        seconds=seconds,
        error=error,
    )
