"""A stand-in engine for tests of the code around it: it answers from a formula, at once.

The projection of a text is its share of the letter h; a generated text is kind where α is positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import vllm_steer
from batch_jobs.config.study import Study
from batch_jobs.directions.directions_and_norms import Probes
from batch_jobs.generate.shard_runner import ShardJob
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Scenario
from vllm_steer import Direction, Readout, ReadoutResult, Steering

HIDDEN = 8
KIND, COLD = "I am sorry and want to help and listen. ", "I win the task. "
LOG_LIKELIHOOD = -1.5
COMPLETION_TOKENS = 40


class FormulaEngine:
    """Records every batch in `batches`, and the variables of the chat template in `variables`."""

    opening = ""
    """The text with which the chat template begins the assistant's turn."""

    def __init__(self) -> None:
        self.variables: list[dict[str, Any]] = []
        self.chat_template = "{{ messages }}"
        self.batches: list[list[SimpleNamespace]] = []
        self.unfinished = 0
        self.emptied: list[int] = []
        """How many batches had run whenever the prefix cache was emptied."""

    def reset_prefix_cache(self) -> bool:
        """Notes it in `emptied`."""
        self.emptied.append(len(self.batches))
        return True

    def get_tokenizer(self) -> FormulaEngine:
        """The engine is its own tokenizer: one token per letter."""
        return self

    def __call__(self, text: str, *, truncation: bool = False, max_length: int = 10**9, **_: Any) -> Any:
        return {"input_ids": [ord(letter) for letter in text][:max_length]}

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> str:
        """The first message as a user's turn, and the beginning of the assistant's."""
        assert (tokenize, add_generation_prompt) == (False, True)
        self.variables.append(variables)
        return f"<user>{messages[0]['content']}<assistant>{self.opening}"

    def get_metrics(self) -> list[Any]:
        """No metrics."""
        return []

    @property
    def generated(self) -> list[list[SimpleNamespace]]:
        """The batches that generated rows, without those that only read."""
        return [batch for batch in self.batches if batch[0].fields["max_tokens"] > 1]

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool) -> list[Any]:
        """One output per prompt, as `answer` makes it; `unfinished` holds the batch's size if `answer` raises."""
        self.batches.append(list(params))
        self.unfinished = len(params)
        outputs = [self.answer(prompt, wanted) for prompt, wanted in zip(prompts, params, strict=True)]
        self.unfinished = 0
        return outputs

    def answer(self, prompt: Any, wanted: SimpleNamespace) -> SimpleNamespace:
        """The output of one request; tests replace it to make a row fail."""
        alpha = sum(entry.alpha for entry in wanted.steering)
        ids = prompt["prompt_token_ids"]
        count = min(COMPLETION_TOKENS, wanted.fields["max_tokens"])
        completion = SimpleNamespace(
            text=(KIND if alpha > 0 else COLD) * 8,
            token_ids=[ord("h")] * count,
            finish_reason="length",
            stop_reason=None,
        )
        return SimpleNamespace(
            prompt_token_ids=ids,
            num_cached_tokens=0,
            prompt_logprobs=[None, *({token: SimpleNamespace(logprob=LOG_LIKELIHOOD)} for token in ids[1:])],
            wanted=wanted,
            outputs=[completion],
            metrics=SimpleNamespace(arrival_time=1.7e9, scheduled_ts=1.0, last_token_ts=3.5),
        )


def rows_of(ids: Sequence[int], layer: int, first: int) -> npt.NDArray[np.float32]:
    """float32 (N, HIDDEN): the stream of these tokens, of which the first has the position ``first``."""
    rows = [[token, layer, first + place, *[0.5] * (HIDDEN - 3)] for place, token in enumerate(ids)]
    return np.array(rows, np.float32).reshape(-1, HIDDEN)


def readout_of(output: Any) -> list[ReadoutResult]:
    """The readout of an output's only sample."""
    ids, wanted = output.prompt_token_ids, output.wanted.readout
    ids = ids[wanted.skip_first :]
    if wanted.pool == "rows":
        if wanted.span == "all":
            ids = [*ids, *output.outputs[0].token_ids[:-1]]
        rows = {layer: rows_of(ids, layer, wanted.skip_first) for layer in wanted.layers}
        return [ReadoutResult({}, len(ids), rows=rows)]
    vector = np.full(HIDDEN, 0.5, dtype=np.float32)
    vector[1] = sum(token == ord("h") for token in ids) / len(ids)
    projections = {name: dict.fromkeys(wanted.layers, float(vector[1])) for name in wanted.project}
    return [ReadoutResult(dict.fromkeys(wanted.layers, vector), len(ids), projections)]


def small_study(**changes: Any) -> Study:
    """A study that a FormulaEngine runs in a moment, with `changes` to its config."""
    document = {
        "name": "small",
        "model": "owner/model",
        "extract": {"layers": [2, 3]},
        "steer": {"layers": [3], "alphas": [-1, 0, 1], "scenarios": ["the_duel", "the_maze"], "samples": 2},
        "skip_first": 1,
        "rows_per_part": 8,
    }
    return Study.model_validate({**document, **changes})


def small_job(folder: Path, **changes: Any) -> ShardJob:
    """A grid of 12 rows, with `changes` to its study; its run directory is `folder`."""
    study = Study.model_validate(
        {
            "name": "small",
            "model": "owner/model",
            "extract": {"layers": [3]},
            "steer": {"layers": [3], "alphas": [-1, 0, 1], "scenarios": ["the_duel"], "samples": 4},
            **changes,
        }
    )
    vector = np.eye(HIDDEN, dtype=np.float32)[1]
    validation = SimpleNamespace(mean_residual_norms={3: 10.0})  # the only part that a worker uses
    probes = Probes({("empathy", 3): Direction("empathy", 3, vector)}, validation)  # type: ignore[arg-type]
    scenario = Scenario("the_duel", "The Duel", "Win the duel.", "Your rival is crying.", ())
    return ShardJob(study, {"the_duel": scenario}, probes, RunDirectory(folder), {})


def install_for_studies(monkeypatch: pytest.MonkeyPatch, blocks: int) -> FormulaEngine:
    """`install`, and tell the pipeline that the model has so many decoder blocks."""
    for module in ("engine.start_engine", "pipeline", "generate.local_executor"):
        monkeypatch.setattr(f"batch_jobs.{module}.decoder_blocks", lambda *_, **__: blocks)
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    """Put a FormulaEngine behind the public names of vllm_steer, and return it."""
    made = FormulaEngine()

    def steered(fields: Any, entries: list[Steering], readout: Readout) -> Any:
        return SimpleNamespace(fields=fields, steering=entries, readout=readout)

    def register(llm: Any, directions: list[Direction]) -> None:
        assert all(abs(direction.norm - 1) < 1e-6 for direction in directions)

    def abandon(llm: FormulaEngine) -> int:
        abandoned, llm.unfinished = llm.unfinished, 0
        return abandoned

    stand_ins = {
        "load_llm": lambda *_, **__: made,
        "steered": steered,
        "register_directions": register,
        "abandon_requests": abandon,
        "close_llm": lambda _: None,
        "collect_readouts": lambda _, outputs: [readout_of(output) for output in outputs],
    }
    for name, stand_in in stand_ins.items():
        # set in the namespace itself: setattr would look the real one up first, and so import vLLM
        monkeypatch.setitem(vars(vllm_steer), name, stand_in)
    return made
