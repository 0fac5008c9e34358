"""Generate contrastive pairs: models answer one scenario under two system prompts, several models in rotation.

The output is a JSONL file that `load_split` reads. It grows by whole, synced lines, and stored pairs are never
requested again: an interrupted call resumes where it stopped, and a finished one makes no request.
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
from batch_jobs.texts.contrastive import SIDES, Scenario, steering_prompts
from batch_jobs.texts.thought import OPEN_THOUGHT

MIN_WORDS = 40
"""Shorter texts are unusable; the bundled prompts ask for 80 to 100 words."""
_REFUSAL_START: Final = re.compile(
    r"\W*(?:i['’]?m sorry|sorry|i apologi[sz]e|unfortunately)?\W*(?:but\W+)?(?:"
    r"i(?: can['’]?t| cannot| can not| won['’]?t| will not| am unable to|['’]m unable to|['’]m not able to)\W+"
    r"(?:assist|help with|comply|fulfil|provide|continue with|create|generate|write|role-?play|engage|participate)"
    r"|as an? (?:ai|artificial|large language)\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SystemPrompts:
    """The two system prompts that make the contrast of a pair."""

    positive: str
    negative: str


@dataclass(frozen=True)
class GivenUp:
    """A pair that no attempt made usable."""

    pair_id: str
    source_model: str
    complaint: str
    """Why the last attempt was unusable."""


@dataclass(frozen=True)
class PairGeneration:
    """Result of a call of `generate_pairs`."""

    written: int
    reused: int
    """Pairs that were already in the file."""
    given_up: tuple[GivenUp, ...]


@dataclass(frozen=True)
class _Job:
    pair_id: str
    scenario: Scenario
    run: int
    writer: TextWriter


def load_system_prompts(source: Path | None) -> SystemPrompts:
    """Read system prompts from a JSON object with the texts `positive` and `negative`. None: the bundled prompts.

    Raises:
        StudyError: the file is absent or malformed, its texts are equal, or a text has no UTF-8 form.
    """
    place = resources.files("batch_jobs") / "data" / "system_prompts.json" if source is None else source
    match read_json(place, advice="give a JSON file with the two system prompts"):
        case {"positive": str(positive), "negative": str(other)} | {
            "empathic": str(positive),
            "non_empathic": str(other),
        } if positive.strip() and other.strip():
            pass  # the second form is that of earlier versions
        case _:
            raise StudyError(f'{place}: must be an object of two texts, "positive" and "negative".')
    if positive == other:
        raise StudyError(f"{place}: both system prompts are the same; give two prompts that differ.")
    return SystemPrompts(positive, other)


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
    """Write the missing pairs to `out`, so that it has `runs` pairs for each scenario.

    Both sides of a pair come from the same model, scenario prompt and seed; only the system prompt differs. Run r of
    scenario number s uses writer (s + r) modulo the number of writers, so all writers serve each scenario equally
    often. A text is unusable when it is empty, a refusal or too short, ended inside the model's thought or has no UTF-8
    form; a pair also when its texts are equal. An unusable pair is generated again, both sides with another seed, up to
    `max_attempts` times in all. Then it is left out and reported, and the next call tries again. A text cut off by the
    token limit is kept; the record's `cut_off` names its side.

    Args:
        out: JSONL file to append to.
        writers: the models, at least one.
        scenarios: id -> scenario, at least one.
        prompts: system prompts of the two sides.
        runs: pairs per scenario, >= 1.
        seed: base of the request seeds.
        max_attempts: attempts per pair, >= 1.
        console: gets one line per attempt.

    Raises:
        StudyError: `out` holds something else. Errors of a writer pass through; finished pairs stay stored.
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
    """Yield each job with its two drafts (positive, negative) and their seed as soon as both are finished."""
    for writer in dict.fromkeys(job.writer for job in jobs):
        asked: dict[TextRequest, tuple[_Job, int]] = {}
        for job in jobs:
            if job.writer is writer:
                prompts_of = steering_prompts(job.scenario)
                user, request_seed = prompts_of[(job.run - 1) % len(prompts_of)], _request_seed(seed, job, attempt)
                for side, system in enumerate((prompts.positive, prompts.negative)):
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
    """Why the pair is unusable; None when it is usable."""
    for side, draft in zip(SIDES, drafts, strict=True):
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
        "positive": drafts[0].text,
        "negative": drafts[1].text,
        "source_model": job.writer.name,
        "run": job.run,
        "seed": seed,
        "cut_off": [side for side, draft in zip(SIDES, drafts, strict=True) if draft.cut_off],
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
