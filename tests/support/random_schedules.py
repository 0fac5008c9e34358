"""Random schedules for the V2 runner: real outputs of vLLM's scheduler, made by a fake one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_steer import Direction
from vllm_steer.engine.resolved_spec import RESOLVED_KEY, Resolved, ResolvedReadout, Traced, Window
from vllm_steer.plan.entry_rows import Entry, pack

SIZE, VOCAB = 8, 50
HOOKED = [0, 2]
MAX_REQUESTS, MAX_TOKENS = 4, 24
DIRECTIONS = {
    (index, slot): np.random.default_rng(slot).standard_normal(SIZE).astype(np.float32) / 3
    for slot, index in enumerate((0, 0, 1, 1))
}
CONTENTS = [(slot, Direction(str(slot), 0, vector).content_hash) for (_, slot), vector in DIRECTIONS.items()]


@dataclass
class Job:
    """A request of the fake scheduler; `tokens` are prompt and generated ones, known from the start."""

    request_id: str
    tokens: list[int]
    resolved: Resolved
    num_known: int  # tokens that the scheduler has: the prompt and what was generated so far
    num_computed: int = 0
    is_steered: bool = True

    def as_new(self) -> NewRequestData:
        """The request as the scheduler sends it to the runner for the first time."""
        extra = {RESOLVED_KEY: self.resolved.dump()} if self.is_steered else None
        return NewRequestData(
            req_id=self.request_id,
            prompt_token_ids=self.tokens[: self.resolved.prompt_len],
            mm_features=[],
            sampling_params=SamplingParams(extra_args=extra),
            pooling_params=None,
            block_ids=([],),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=self.tokens[: self.num_known],
        )


class FakeScheduler:
    """Random arrivals, chunks, preemptions, resumptions, aborts and ends, as an asynchronous scheduler makes them.

    A request whose last token has been sampled may be scheduled for one token more before the runner hears of its end.
    """

    def __init__(self, seed: int, jobs: list[Job]) -> None:
        self.rng = np.random.default_rng(seed)
        self.waiting, self.running = list(jobs), list[Job]()
        self.ended: list[Job] = []  # the runner hears of them with the next output
        self.counted = Counter[str]()

    def schedule(self) -> SchedulerOutput:
        """The next step, after random preemptions and arrivals."""
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = {job.request_id for job in self.ended}
        self.ended = []
        output.preempted_req_ids = set()
        for job in [job for job in self.running if job.num_known < len(job.tokens) and self.rng.random() < 0.06]:
            self.running.remove(job)
            output.preempted_req_ids.add(job.request_id)
            self.counted["preempted"] += 1
            self.counted["preempted while generating"] += job.num_known > job.resolved.prompt_len
            job.num_computed = 0
            self.waiting.insert(int(self.rng.integers(len(self.waiting) + 1)), job)
        new = []
        while self.waiting and len(self.running) < MAX_REQUESTS and self.rng.random() < 0.7:
            job = self.waiting.pop(0)
            new.append(job)
            self.running.append(job)
        cached = CachedRequestData.make_empty()
        for job in self.running:
            count = min(job.num_known - job.num_computed, int(self.rng.integers(1, 1 + MAX_TOKENS // MAX_REQUESTS)))
            output.num_scheduled_tokens[job.request_id] = count
            if job in new:
                output.scheduled_new_reqs.append(job.as_new())
            else:
                cached.req_ids.append(job.request_id)
                cached.num_computed_tokens.append(job.num_computed)
                cached.new_block_ids.append(None)
        output.scheduled_cached_reqs = cached
        output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
        return output

    def update(self, output: SchedulerOutput) -> list[Job]:
        """Take the step's tokens; return the requests that have all of theirs and will not be scheduled again."""
        done = []
        for job in list(self.running):
            job.num_computed += output.num_scheduled_tokens[job.request_id]
            was_over = job.num_known == len(job.tokens)
            if job.num_computed == job.num_known and not was_over:
                job.num_known += 1
            if was_over or (job.num_known == len(job.tokens) and self.rng.random() < 0.5):
                self.counted["one token too many"] += was_over and job.num_computed == len(job.tokens)
                done.append(job)
        for job in done:
            self.running.remove(job)
            self.ended.append(job)
        return done

    def abort_one(self) -> None:
        """Abort a random request that has generated a token, if there is one."""
        candidates = [job for job in (*self.running, *self.waiting) if job.num_known > job.resolved.prompt_len]
        if candidates:
            job = candidates[int(self.rng.integers(len(candidates)))]
            self.counted["aborted"] += 1
            self.counted["aborted while preempted"] += job in self.waiting
            (self.running if job in self.running else self.waiting).remove(job)
            self.ended.append(job)


def random_jobs(seed: int, count: int) -> list[Job]:
    """`count` requests with random prompts, steering and readouts."""
    rng = np.random.default_rng(seed)

    def entries() -> list[Entry]:
        chosen = [key for key in DIRECTIONS if rng.random() < 0.5]
        return [Entry(index, slot, float(rng.normal() * 3), float(rng.choice([0.0, -1.0]))) for index, slot in chosen]

    jobs = []
    for number in range(count):
        prompt_len, generated = int(rng.integers(2, 16)), int(rng.integers(2, 10))
        span = rng.choice(["prompt", "generated", "all", "none"])
        readout = ResolvedReadout(
            layers=HOOKED,
            layer_indices=[0, 1],
            first=prompt_len if span == "generated" else 0,
            end=prompt_len if span == "prompt" else None,
            project=[],
            vectors=True,
            trace=[Traced("one", 0, 0), Traced("two", 1, 2)],
        )
        if rng.random() < 0.3:
            readout = replace(readout, vectors=False, pool="rows")
        name = f"request-{seed}-{number}"
        starts = sorted({0, prompt_len, *rng.integers(0, prompt_len + generated, 2).tolist()})
        windows = [Window(start, pack(entries()), "") for start in starts]
        asked = Resolved(name, name, prompt_len, windows, None if span == "none" else readout, CONTENTS)
        tokens = rng.integers(0, VOCAB, prompt_len + generated).tolist()
        jobs.append(Job(f"{name}-0abc", tokens, asked, num_known=prompt_len, is_steered=rng.random() < 0.8))
    return jobs
