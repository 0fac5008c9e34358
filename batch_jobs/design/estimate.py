"""Work and time of a study before it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_jobs.config.study import Study, StudyError
from batch_jobs.generate.generate_batch import is_read_again
from batch_jobs.rows.grid import Row
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.prompts import Prompt

START_SECONDS = 60.0
"""Assumed time to start an engine and to write a report."""
READING_SPEEDUP = 4.0
"""Assumed ratio of tokens read to tokens generated in the same time."""
CPU_CORE_FLOPS, GPU_FLOPS = 2e10, 5e13
"""Assumed speed of generation on one core and on one GPU, in operations a second."""


@dataclass(frozen=True)
class Work:
    """Tokens and rows of a study, at most."""

    rows: int
    control_rows: int
    """Those of `rows` that are steered with a control."""
    new_tokens: int
    """Tokens generated if every completion is as long as it may be."""
    read_tokens: int
    """Tokens of texts, prompts and completions that are read without being generated, prefix caching aside."""


@dataclass(frozen=True)
class Rate:
    """Generation speed of one engine."""

    tokens_per_second: float
    source: str
    """Where the number comes from."""
    includes_reading: bool = False
    """Whether the time of reading the completions once more is in it."""


def study_work(study: Study, rows: Iterable[Row], prompts: Mapping[str, Sequence[Prompt]], text_tokens: int) -> Work:
    """What a study generates and reads.

    Args:
        study: the config.
        rows: the whole grid.
        prompts: scenario id -> its prompts, which take turns over the samples.
        text_tokens: tokens of the contrastive texts, ablated copies included; they are read under two poolings.
    """
    longest = study.sampling.max_tokens
    counts = {scenario: [len(prompt.token_ids) for prompt in several] for scenario, several in prompts.items()}
    num_rows = control_rows = prompt_tokens = again = 0
    for row in rows:
        several = counts[row.condition.scenario_id]
        tokens = several[row.sample % len(several)]
        num_rows += 1
        control_rows += row.condition.is_control
        prompt_tokens += tokens
        again += tokens + longest if is_read_again(row, study) else 0
    return Work(
        rows=num_rows,
        control_rows=control_rows,
        new_tokens=longest * num_rows,
        read_tokens=2 * text_tokens + prompt_tokens + again,
    )


def seconds(work: Work, rate: Rate) -> float:
    """Time of the whole study by the module's assumptions, if every completion is as long as it may be."""
    reading = 0.0 if rate.includes_reading else work.read_tokens / (READING_SPEEDUP * rate.tokens_per_second)
    return START_SECONDS + work.new_tokens / rate.tokens_per_second + reading


def earlier_rate(study: Study, runs: Path) -> Rate | None:
    """The rate of the latest run of the same model and dtype under `runs`; None without one.

    Records that cannot be read are passed over: they belong to other studies.
    """
    found: list[tuple[str, Rate]] = []
    for record in sorted(runs.glob("*/provenance.json")):
        try:
            document = RunDirectory(record.parent).read_provenance()
        except StudyError:
            continue
        config = document.get("config")
        if not isinstance(config, Mapping) or any(config.get(one) != getattr(study, one) for one in ("model", "dtype")):
            continue
        for session in document.get("sessions", []):
            tokens, taken = session.get("tokens_generated"), session.get("generation_seconds")
            if tokens and taken:
                source = f"the run {record.parent}, its reading of completions included"
                found.append((str(session.get("finished_at")), Rate(tokens / taken, source, includes_reading=True)))
    return max(found, key=lambda one: one[0])[1] if found else None


def rough_rate(study: Study, model_config: Any) -> Rate:
    """A rough figure from the size of the model and this machine's device alone.

    `model_config`: the text part of the model's Hugging Face config.
    """
    import torch

    parameters = parameter_count(model_config)
    gpus = study.engine.tensor_parallel_size if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0))
    flops = gpus * GPU_FLOPS if gpus else cores * CPU_CORE_FLOPS
    device = f"{gpus} GPU" if gpus else f"{cores} CPU cores"
    source = f"a rough figure for {parameters / 1e9:.2g} billion parameters on {device}, not measured"
    return Rate(flops / (2 * parameters), source)


def parameter_count(model_config: Any) -> float:
    """About the number of parameters of a dense decoder, from its config."""
    width, blocks = model_config.hidden_size, model_config.num_hidden_layers
    inner = getattr(model_config, "intermediate_size", None) or 4 * width
    return float(blocks * (4 * width**2 + 3 * width * inner) + model_config.vocab_size * width)
