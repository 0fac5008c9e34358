"""Check a study without an engine: its texts, the prompts as the model will read them, its grid and its power."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from batch_jobs.config.study import Study, StudyError
from batch_jobs.design.estimate import Rate, Work, earlier_rate, rough_rate, seconds, study_work
from batch_jobs.design.power import Power, design_power
from batch_jobs.directions.directions_and_norms import steering_keys
from batch_jobs.directions.extract import study_texts
from batch_jobs.engine.start_engine import decoder_blocks, model_location, text_config
from batch_jobs.pairs.check import PairReport, check_pairs
from batch_jobs.pipeline import chosen_scenarios, refuse_texts_of_another_concept, study_direction_files
from batch_jobs.rows.grid import StudyRows
from batch_jobs.texts.contrastive import Pair, Split, load_split
from batch_jobs.texts.prompts import Prompt, text_prompt
from batch_jobs.texts.study_prompts import study_prompts, too_long
from vllm_steer import Direction
from vllm_steer.errors import SteerError

T = TypeVar("T")


@dataclass(frozen=True)
class StudyCheck:
    """What is known of a study before it runs. A part is None where a problem keeps it from being known."""

    study: Study
    problems: tuple[str, ...]
    """What would make the run fail or its held-out texts worthless, one sentence each."""
    warnings: tuple[str, ...]
    split: Split | None
    pairs: PairReport | None
    """Findings over all pairs of both sides of the split."""
    blocks: int | None
    """Decoder blocks of the model."""
    prompts: Mapping[str, Sequence[Prompt]] | None
    """Scenario id -> the prompts as the model will read them."""
    files: Sequence[Direction]
    """The directions of files."""
    power: Power | None
    """None for a grid of α = 0 alone."""
    work: Work | None
    rate: Rate | None

    @property
    def seconds(self) -> float | None:
        """Time of the run, if every completion is as long as it may be."""
        return None if self.work is None or self.rate is None else seconds(self.work, self.rate)

    @property
    def exit_code(self) -> int:
        """1 when there are problems, else 0."""
        return int(bool(self.problems))


def check_study(study: Study, *, runs: Path, tokens_per_second: float | None = None) -> StudyCheck:
    """Check a study from its texts, its tokenizer and the model's config; no weights are read and no engine starts.

    Every problem is collected, so that one call shows them all.

    Args:
        study: the config.
        runs: the folder of run directories, for the rate of an earlier run.
        tokens_per_second: the rate to reckon with, instead of an earlier run's or a rough figure.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except SteerError as error:
            problems.append(str(error))
            return None

    attempt(lambda: refuse_texts_of_another_concept(study))
    split = attempt(lambda: load_split(study.pairs, study.split))
    report = attempt(lambda: check_pairs((*split.train, *split.test), study.concept)) if split else None
    problems += report.problems if report else ()
    scenarios = attempt(lambda: chosen_scenarios(study))
    location = model_location(study.model)
    blocks = attempt(lambda: decoder_blocks(location, trust_remote_code=study.engine.trust_remote_code))
    if blocks is not None:
        attempt(lambda: study.hooked_layers(blocks))
    files = attempt(lambda: study_direction_files(study, location)) or []
    tokenizer = attempt(lambda: load_tokenizer(study, location)) if blocks is not None else None
    prompts = None
    if tokenizer is not None and scenarios is not None:
        prompts = attempt(lambda: study_prompts(study, scenarios, tokenizer))
    problems += too_long(study, prompts) if prompts else ()
    work = None
    if split is not None and prompts is not None:
        work = study_work(study, planned_rows(study), prompts, _text_tokens(study, split, tokenizer))
    rate = Rate(tokens_per_second, "--tokens-per-second") if tokens_per_second else earlier_rate(study, runs)
    if rate is None and blocks is not None:
        rate = rough_rate(study, text_config(location, trust_remote_code=study.engine.trust_remote_code))
    return StudyCheck(
        study=study,
        problems=tuple(problems),
        warnings=report.warnings if report else (),
        split=split,
        pairs=report,
        blocks=blocks,
        prompts=prompts,
        files=files,
        power=_power(grid_of(study)),
        work=work,
        rate=rate,
    )


def planned_rows(study: Study) -> StudyRows:
    """The grid's rows before anything is measured: all but the α that are derived from a norm or a separation."""
    keys = steering_keys(study)
    return StudyRows(study, {layer: 1.0 for _, layer in keys}, dict.fromkeys(keys, 1.0))


@dataclass(frozen=True)
class GridShape:
    """The numbers of a grid that its power depends on; see `design_power`."""

    samples: int
    alphas: int
    groups: int
    below_zero: int


def grid_of(study: Study) -> GridShape:
    """The shape of a study's grid. Each scenario, at each layer and along each direction, is a group of its own;
    controls are not counted."""
    grid = study.steer
    return GridShape(
        samples=grid.samples,
        alphas=len(grid.alphas),
        groups=len(steering_keys(study)) * len(grid.scenarios),
        below_zero=sum(alpha < 0 for alpha in grid.alphas),
    )


def load_tokenizer(study: Study, location: str) -> Any:
    """The model's Hugging Face tokenizer.

    Raises:
        StudyError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=study.engine.trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise StudyError(
            f"The tokenizer of {study.model} cannot be loaded ({first_line}); give a model with its tokenizer."
        ) from error


def pairs_by_scenario(pairs: Sequence[Pair]) -> dict[str, int]:
    """Scenario id -> number of pairs, sorted by id."""
    return dict(sorted(Counter(pair.scenario_id for pair in pairs).items()))


def _text_tokens(study: Study, split: Split, tokenizer: Any) -> int:
    texts = [text.text for members in study_texts(study, split).values() for _, text in members]
    return sum(len(text_prompt(tokenizer, text, max_tokens=study.extract.max_tokens).token_ids) for text in texts)


def _power(shape: GridShape) -> Power | None:
    if shape.alphas < 2:
        return None
    return design_power(shape.samples, shape.alphas, shape.groups, below_zero=shape.below_zero)
