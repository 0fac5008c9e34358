"""`vllm-steer evaluate`: lm-eval tasks over directions and α in one engine."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from batch_jobs.config.evaluation import Evaluation, Target
from batch_jobs.directions.control import control_direction
from batch_jobs.engine.start_engine import model_location, model_revision
from batch_jobs.errors import StudyError
from batch_jobs.harnesses.lm_eval_model import SteeredLM
from batch_jobs.harnesses.local_task import EvaluationTask, read_task
from batch_jobs.harnesses.result_table import KEY, Result, Steered, read_results, write_results
from batch_jobs.run.provenance import git_commit, package_versions
from vllm_steer import Direction, load_directions

_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class Setting:
    """One steering of the sweep.

    Attributes:
        steered: see `Result`.
        applied: the direction that is added; None for the unsteered model.
        direction: name of the direction, or of the one that a control is for.
        control: number of the control.
        alpha: the multiplier; 0 for the unsteered model.
    """

    steered: Steered
    applied: Direction | None = None
    direction: str | None = None
    control: int | None = None
    alpha: float = 0.0

    @property
    def shown(self) -> str:
        """For progress."""
        return "unsteered" if self.applied is None else f"{self.applied.key} α {self.alpha:g}"


def evaluate(
    evaluation: Evaluation, out: Path, *, console: Console, overwrite: bool = False, quiet: bool = False
) -> list[Result]:
    """Evaluate every steering on every task and write one Parquet file; goes on where an earlier call stopped.

    The file is written anew after each steering and task.

    Args:
        evaluation: the config.
        out: the Parquet file.
        console: for progress.
        overwrite: replace the results of another evaluation.
        quiet: show no progress.

    Returns:
        All results, in the order of the settings.

    Raises:
        StudyError: a file cannot be used, or a task has no results.
        SteerError: the engine cannot apply the steering.
    """
    settings = list(sweep(evaluation, [one for file in evaluation.directions for one in load_directions(file)]))
    tasks = [read_task(task) for task in evaluation.tasks]
    _refuse_repeats(tasks)
    running = _Running(evaluation, settings, tasks)
    key = running.key
    kept = {} if overwrite else _by_cell(read_results(out, key))
    results: dict[str, list[Result]] = {}
    cells = [(setting, task) for setting in settings for task in tasks]
    try:
        for number, (setting, task) in enumerate(cells, start=1):
            cell = _cell(setting, task)
            if cell in kept:
                results[cell] = kept[cell]
                continue
            results[cell] = running.cell(setting, task, cell)
            done = {**kept, **results}
            write_results(out, [row for rows in done.values() for row in rows], running.metadata)
            if not quiet:
                first = results[cell][0]
                shown = f"{first.metric} {first.value:.4g}, {first.seconds:.1f} s"
                console.print(f"{number}/{len(cells)} {task.name}, {setting.shown}: {shown}", highlight=False)
    finally:
        running.close()
    return [row for rows in results.values() for row in rows]


def sweep(evaluation: Evaluation, directions: Sequence[Direction]) -> Iterator[Setting]:
    """All settings of an evaluation, the unsteered model first.

    Raises:
        StudyError: a direction is not in the files, or at several layers and the config names none.
    """
    yield Setting("unsteered")
    for target in evaluation.steer:
        direction = _find(target, directions)
        controls = [
            control_direction(direction, seed=evaluation.control_seed, number=number)
            for number in range(evaluation.controls)
        ]
        for alpha in evaluation.steered_alphas:
            yield Setting("direction", direction, direction.name, None, alpha)
            for number, control in enumerate(controls):
                yield Setting("control", control, direction.name, number, alpha)


class _Running:
    """The engine, started when a cell needs it, and what the file says about the whole evaluation."""

    def __init__(self, evaluation: Evaluation, settings: Sequence[Setting], tasks: Sequence[EvaluationTask]) -> None:
        self._evaluation, self._tasks = evaluation, tasks
        self._directions = {one.applied.key: one.applied for one in settings if one.applied is not None}
        self._location = model_location(evaluation.model)

    @cached_property
    def _lm(self) -> SteeredLM:
        own = self._evaluation
        lm = SteeredLM(
            own.model,
            layers=sorted({one.layer for one in self._directions.values()}),
            dtype=own.dtype,
            max_model_len=own.max_model_len,
            max_gen_toks=own.max_gen_toks,
            seed=own.seed,
            show_progress=False,  # a line for each cell says enough
            max_directions=max(len(self._directions), 1),
            **own.engine.steer_settings(),
            **own.engine.engine_args(),
        )
        lm.register(list(self._directions.values()))
        return lm

    @cached_property
    def _task_manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        # reading the index of lm-eval's own tasks takes ten seconds
        is_named = any(task.document is None for task in self._tasks)
        folder = self._evaluation.include_path
        return TaskManager(include_path=None if folder is None else str(folder), include_defaults=is_named)

    @property
    def key(self) -> str:
        """Digest of everything that the results depend on."""
        parts = [
            self._evaluation.identity,
            {key: one.content_hash for key, one in self._directions.items()},
            [[task.name, task.digest] for task in self._tasks],
            model_revision(self._location, None),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return {
            KEY: self.key,
            "config_hash": self._evaluation.config_hash,
            "config": json.dumps(self._evaluation.model_dump(mode="json"), sort_keys=True),
            "directions": json.dumps({key: one.content_hash for key, one in self._directions.items()}),
            "tasks": json.dumps({task.name: task.digest for task in self._tasks}),
            "versions": json.dumps(package_versions(), sort_keys=True),
            "git_commit": git_commit() or "",
        }

    def cell(self, setting: Setting, task: EvaluationTask, cell: str) -> list[Result]:
        """Evaluate one steering on one task.

        Raises:
            StudyError: lm-eval gives no results.
        """
        import lm_eval

        own = self._evaluation
        applied = setting.applied
        entry = None if applied is None else own.entry(applied.name, applied.layer, setting.alpha)
        self._lm.steer(entry)
        began = time.monotonic()
        told = lm_eval.simple_evaluate(
            model=self._lm,
            tasks=[task.spec],
            task_manager=self._task_manager,
            num_fewshot=own.num_fewshot,
            limit=own.limit,
            apply_chat_template=own.apply_chat_template,
            system_instruction=own.system_instruction,
            fewshot_as_multiturn=own.apply_chat_template,
            fewshot_random_seed=own.seed,
            log_samples=False,
        )
        seconds = time.monotonic() - began
        about: dict[str, Any] = {
            "cell": cell,
            "steered": setting.steered,
            "direction": setting.direction,
            "control": setting.control,
            "direction_hash": None if applied is None else applied.content_hash,
            "layer": None if applied is None else applied.layer,
            "op": None if entry is None else entry.op,
            "span": None if entry is None else entry.span,
            "alpha": setting.alpha,
            "model": own.model,
            "model_revision": model_revision(self._location, self._lm.engine),
            "seconds": seconds,
            "finished_at": datetime.now(UTC),
        }
        results = [Result(**about, **metric) for metric in _metrics(told or {})]
        if not results:
            raise StudyError(f"lm-eval gave no metric of task {task.name}; give a task that has metrics.")
        return results

    def close(self) -> None:
        """Shut the engine down, if it was started."""
        lm = self.__dict__.pop("_lm", None)
        if lm is not None:
            lm.close()
            del lm
            gc.collect()  # frees its memory now


def _metrics(told: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The metrics in lm-eval's results, as fields of `Result`."""
    for task, values in told.get("results", {}).items():
        better = told.get("higher_is_better", {}).get(task, {})
        documents = told.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in _NOT_METRICS or metric.endswith("_stderr") or not is_number:
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            has_stderr = isinstance(stderr, int | float) and math.isfinite(stderr)
            yield {
                "task": task,
                "metric": metric,
                "filter": chosen or "none",
                "value": float(value),
                "stderr": float(stderr) if has_stderr else None,
                "higher_is_better": better.get(metric),
                "documents": documents,
            }


def _find(target: Target, directions: Sequence[Direction]) -> Direction:
    found = [one for one in directions if one.name == target.direction and target.layer in (None, one.layer)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(sorted(one.key for one in directions))
    wanted = target.direction if target.layer is None else f"{target.direction}@{target.layer}"
    what = "are several" if found else "is none"
    raise StudyError(f"steer names {wanted}, of which there {what}; the direction files hold {keys}. Name one of them.")


def _cell(setting: Setting, task: EvaluationTask) -> str:
    steering = None if setting.applied is None else [setting.applied.key, setting.applied.content_hash, setting.alpha]
    told = json.dumps([steering, task.name, task.digest])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _by_cell(results: Sequence[Result]) -> dict[str, list[Result]]:
    cells: dict[str, list[Result]] = {}
    for result in results:
        cells.setdefault(result.cell, []).append(result)
    return cells


def _refuse_repeats(tasks: Sequence[EvaluationTask]) -> None:
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise StudyError(f"two tasks have the name {repeated[0]}; allowed: one each. Rename one.")
