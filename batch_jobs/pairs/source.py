"""Contrastive pairs written by models: one scenario under two system prompts, several models in rotation.

The output is a JSONL file that `load_split` reads. It grows by whole, synced lines, and pairs that it holds are never
asked for again: a run that was cut short goes on where it stopped, and a finished one makes no call.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Final

from rich.console import Console

from batch_jobs.config.study import StudyError
from batch_jobs.files.documents import read_json
from batch_jobs.files.json_lines import RecordWriter, read_records
from batch_jobs.pairs.writer import Draft, TextRequest, TextWriter
from batch_jobs.texts.contrastive import Scenario, steering_prompt
from batch_jobs.texts.thought import OPEN_THOUGHT

MIN_WORDS = 40
"""A text of fewer words says too little; the bundled prompts ask for 80 to 100."""
_SIDES = ("empathic", "non_empathic")
_REFUSAL_START: Final = re.compile(
    r"\W*(?:i['’]?m sorry|sorry|i apologi[sz]e|unfortunately)?\W*(?:but\W+)?(?:"
    r"i(?: can['’]?t| cannot| can not| won['’]?t| will not| am unable to|['’]m unable to|['’]m not able to)\W+"
    r"(?:assist|help with|comply|fulfil|provide|continue with|create|generate|write|role-?play|engage|participate)"
    r"|as an? (?:ai|artificial|large language)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SystemPrompts:
    """The two instructions that set the sides of a pair apart."""

    empathic: str
    non_empathic: str


@dataclass(frozen=True)
class GivenUp:
    """A pair that no attempt made usable."""

    pair_id: str
    source_model: str
    complaint: str
    """What was wrong with the last attempt."""


@dataclass(frozen=True)
class PairGeneration:
    """What a call of `generate_pairs` did."""

    written: int
    reused: int
    """Pairs that the file held before."""
    given_up: tuple[GivenUp, ...]


@dataclass(frozen=True)
class _Job:
    pair_id: str
    scenario: Scenario
    run: int
    writer: TextWriter


def load_system_prompts(source: Path | None) -> SystemPrompts:
    """System prompts from a JSON object with the texts `empathic` and `non_empathic`; None means the bundled ones.

    Raises StudyError when the file is absent or malformed, or holds text without a UTF-8 form.
    """
    place = resources.files("batch_jobs") / "data" / "system_prompts.json" if source is None else source
    match read_json(place, advice="give a JSON file with the two system prompts"):
        case {"empathic": str(empathic), "non_empathic": str(other)} if empathic.strip() and other.strip():
            pass
        case _:
            raise StudyError(f'{place}: must be an object of two texts, "empathic" and "non_empathic".')
    if empathic == other:
        raise StudyError(f"{place}: both system prompts are the same, so the sides of a pair would differ in nothing.")
    return SystemPrompts(empathic, other)


def generate_pairs(
    out: Path,
    writers: Sequence[TextWriter],
    scenarios: Mapping[str, Scenario],
    prompts: SystemPrompts,
    *,
    runs: int,
    seed: int,
    max_attempts: int,
    console: Console,
) -> PairGeneration:
    """Write `runs` pairs for each scenario into `out`, those that it lacks.

    Both sides of a pair come from one model, one scenario prompt and one seed; only the system prompt differs. The
    writer of run r of scenario number s is number (s + r) modulo their count, so every scenario hears all of them
    equally often. A pair with an unusable side is drawn again as a whole with another seed, `max_attempts` times in
    all, and then left out and reported; the next call tries it again. Unusable is a text that is empty, refused or too
    short, that ended inside the model's thought or has no UTF-8 form, and a pair of equal texts. One that the token
    limit cut off is kept; the record's `cut_off` names its side.

    `runs`, `max_attempts` >= 1; `writers` and `scenarios` not empty. Raises StudyError for a file that holds something
    else, and what a writer raises, after everything finished has been stored.
    """
    held = _held_pair_ids(out)
    jobs = [
        _Job(f"{scenario.id}-{run:02d}", scenario, run, writers[(number + run) % len(writers)])
        for number, scenario in enumerate(scenarios.values())
        for run in range(1, runs + 1)
    ]
    pending = [job for job in jobs if job.pair_id not in held]
    reused = len(jobs) - len(pending)
    complaints: dict[str, str] = {}
    written = 0
    if not pending:
        return PairGeneration(0, reused, ())
    with RecordWriter(out) as file:
        for attempt in range(max_attempts):
            failed: list[_Job] = []
            for job, texts, request_seed in _draw(pending, prompts, seed, attempt):
                if complaint := _complaint(texts):
                    complaints[job.pair_id] = complaint
                    failed.append(job)
                else:
                    file.append(_record(job, texts, request_seed))
                    written += 1
                news = f"{job.pair_id}: {job.writer.name}: {complaint or 'written'}"
                console.print(news, markup=False, highlight=False, soft_wrap=True)
            pending = failed
    given_up = tuple(GivenUp(job.pair_id, job.writer.name, complaints[job.pair_id]) for job in pending)
    return PairGeneration(written, reused, given_up)


def _held_pair_ids(out: Path) -> frozenset[str]:
    ids = [record.get("pair_id") for record in read_records(out)]
    if not all(isinstance(name, str) for name in ids):
        raise StudyError(f"{out}: holds lines without a pair_id; give --out a file written by this command.")
    return frozenset(str(name) for name in ids)


def _draw(
    jobs: Sequence[_Job], prompts: SystemPrompts, seed: int, attempt: int
) -> Iterator[tuple[_Job, tuple[Draft, Draft], int]]:
    """Each job with its two drafts (empathic, non-empathic) and their seed, as soon as both are there."""
    for writer in dict.fromkeys(job.writer for job in jobs):
        asked: dict[TextRequest, tuple[_Job, int]] = {}
        for job in jobs:
            if job.writer is writer:
                user, request_seed = steering_prompt(job.scenario), _request_seed(seed, job, attempt)
                for side, system in enumerate((prompts.empathic, prompts.non_empathic)):
                    asked[TextRequest(system, user, request_seed)] = (job, side)
        halves: dict[str, dict[int, Draft]] = {}
        for request, draft in writer.write(list(asked)):
            job, side = asked[request]
            sides = halves.setdefault(job.pair_id, {})
            sides[side] = draft
            if len(sides) == 2:
                yield job, (sides[0], sides[1]), request.seed


def _request_seed(seed: int, job: _Job, attempt: int) -> int:
    digest = hashlib.sha256(f"{seed}/{job.pair_id}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # 31 bits: some servers take a signed 32-bit integer


def _complaint(drafts: tuple[Draft, Draft]) -> str | None:
    """Why the pair cannot be used; None when it can."""
    for side, draft in zip(_SIDES, drafts, strict=True):
        words = len(draft.text.split())
        if draft.refusal is not None:
            return f"{side} text refused: {draft.refusal}"
        if draft.fault is not None:
            advice = "; give more tokens, or switch thinking off" if draft.fault == OPEN_THOUGHT else ""
            return f"{side} text {draft.fault}{advice}"
        if not words:
            return f"{side} text is empty"
        if _REFUSAL_START.match(draft.text):
            return f"{side} text is a refusal: {draft.text[:80]!r}"
        if words < MIN_WORDS:
            return f"{side} text has {words} words; at least {MIN_WORDS} are needed"
    if drafts[0].text == drafts[1].text:
        return "both texts are the same"
    return None


def _record(job: _Job, drafts: tuple[Draft, Draft], seed: int) -> dict[str, object]:
    return {
        "pair_id": job.pair_id,
        "scenario_id": job.scenario.id,
        "empathic_text": drafts[0].text,
        "non_empathic_text": drafts[1].text,
        "source_model": job.writer.name,
        "run": job.run,
        "seed": seed,
        "cut_off": [side for side, draft in zip(_SIDES, drafts, strict=True) if draft.cut_off],
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
