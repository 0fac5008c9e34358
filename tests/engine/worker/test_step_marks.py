"""From a row that the op had to cut off to the end of its request: marks on a worker, and what the scheduler does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs, FinishReason
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from tests.support.runner_stand_ins import SIZE, StandInRunner
from vllm_steer import Direction
from vllm_steer.engine import early_ends
from vllm_steer.engine.early_ends import StepMarks, Watching
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.engine.worker import step_marks, worker_steering
from vllm_steer.errors import NoTraceColumn
from vllm_steer.schema.conditions import Watch
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.settings import SteerSettings

BLOCK, NULL = 4, 0
KIND = Direction("kind", 1, np.ones(SIZE)).normalised()


class StandInScheduler:
    """Requests with their blocks, in one group; it records what was evicted and ended."""

    def __init__(self, blocks: dict[str, list[int]], specs: dict[str, dict[str, Any] | None]) -> None:
        self.blocks, self.evicted, self.ended = blocks, set[int](), list[tuple[str, RequestStatus]]()
        self.requests = {
            name: SimpleNamespace(
                request_id=name,
                client_index=0,
                is_finished=lambda: False,
                sampling_params=SimpleNamespace(extra_args={RESOLVED_KEY: specs[name]}),
            )
            for name in blocks
        }
        self.running = list(self.requests.values())
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK))
        self.kv_cache_manager = SimpleNamespace(
            kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
            block_pool=SimpleNamespace(null_block=SimpleNamespace(block_id=NULL)),
            get_block_ids=lambda name: (self.blocks[name],),
            evict_blocks=self.evicted.update,
        )

    def finish_requests(self, request_id: str, status: RequestStatus) -> None:
        self.ended.append((request_id, status))


def spec(prompt: bool, generated: bool, prompt_len: int = 6) -> dict[str, Any]:
    return {"windows": [[0, [1] * prompt, ""], [prompt_len, [1] * generated, ""]]}


def step(
    monkeypatch: pytest.MonkeyPatch, scheduler: StandInScheduler, marked: list[str]
) -> tuple[dict[str, list[int]], dict[int, EngineCoreOutputs]]:
    """Pass a step's output with marks through the wrapper; return the tokens that vLLM saw, and its output."""
    seen: dict[str, list[int]] = {}

    def update(self: Any, scheduler_output: Any, output: Any) -> dict[int, EngineCoreOutputs]:
        seen.update({name: output.sampled_token_ids[at] for name, at in output.req_id_to_index.items()})
        return {}

    names = list(scheduler.requests)
    output = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, [[7] for _ in names])
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, "update_from_output", update)
        early_ends.install()
        told = Scheduler.update_from_output(scheduler, None, step_marks._marked(output, StepMarks(cut_off=marked)))
    return seen, told


def test_a_marked_request_ends_with_the_reason_and_shows_no_token_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = StandInScheduler(
        {"cut": [3, 4, 5], "plain": [6, 7]}, {"cut": spec(prompt=True, generated=True), "plain": None}
    )
    seen, told = step(monkeypatch, scheduler, ["cut", "gone"])
    assert seen == {"cut": [], "plain": [7]}
    assert scheduler.ended == [("cut", RequestStatus.FINISHED_ERROR)]
    assert scheduler.evicted == {3, 4, 5}
    ((ended,),) = (told[0].outputs,)
    assert (ended.request_id, ended.finish_reason, ended.new_token_ids) == ("cut", FinishReason.ERROR, [])
    assert "float16" in str(ended.stop_reason)


def test_requests_that_share_steered_blocks_end_too_and_those_that_share_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = spec(prompt=False, generated=True, prompt_len=9)  # its first two blocks are those of an unsteered prompt
    scheduler = StandInScheduler(
        {"cut": [1, 2, 3, 4], "same": [1, 2, 3, 5], "prompt only": [1, 2, 6], "plain": [1, 2, 7], "null": [NULL, 8]},
        {"cut": late, "same": late, "prompt only": late, "plain": None, "null": spec(prompt=True, generated=True)},
    )
    scheduler.blocks["cut"][0] = scheduler.blocks["same"][0] = NULL  # outside a sliding window
    step(monkeypatch, scheduler, ["cut"])
    assert [name for name, _ in scheduler.ended] == ["cut", "same"]
    assert scheduler.evicted == {3, 4, 5}


def test_an_output_that_vllm_shares_between_steps_is_not_written_to() -> None:
    marked = step_marks._marked(EMPTY_MODEL_RUNNER_OUTPUT, StepMarks(["a"]))
    assert marked is not EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "vllm_steer_marks")
    assert step_marks._marked(EMPTY_MODEL_RUNNER_OUTPUT, StepMarks()) is EMPTY_MODEL_RUNNER_OUTPUT


def stopping(stop: Watch, num_prompt: int, tokens: int, **state: Any) -> StandInScheduler:
    """A scheduler of one request with this stop, which has so many tokens so far."""
    settings = SteerSettings(layers=(1,))
    admission = Admission(settings, SIZE)
    admission.registry.register([KIND])  # type: ignore[attr-defined]
    resolved = admission.resolve("one", RequestSpec((Steering("kind", 1.0),), Readout(stop=stop)), num_prompt)
    scheduler = StandInScheduler({"one": [1]}, {"one": resolved.dump()})
    fields = {"num_prompt_tokens": num_prompt, "num_tokens": tokens, "num_stale_output_tokens": 0}
    vars(scheduler.requests["one"]).update(fields | {"drop_stale_output": False} | state)
    return scheduler


def one_step(
    monkeypatch: pytest.MonkeyPatch, scheduler: StandInScheduler, sampled: list[int], position: int, *values: float
) -> tuple[list[int], list[Any]]:
    """Take a step that shows these projections; return the tokens that vLLM saw, and what the front end is told."""
    seen: list[int] = []

    def update(self: Any, scheduler_output: Any, output: Any) -> dict[int, EngineCoreOutputs]:
        seen.extend(output.sampled_token_ids[0])
        self.requests["one"].num_tokens += len(seen)
        return {}

    output = ModelRunnerOutput(["one"], {"one": 0}, [sampled])
    marks = StepMarks(watching=[Watching("one", position, list(values))])
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, "update_from_output", update)
        early_ends.install()
        told = Scheduler.update_from_output(scheduler, None, step_marks._marked(output, marks))
    return seen, [one for outputs in told.values() for one in outputs.outputs]


def test_a_request_ends_with_the_token_with_which_its_stop_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = stopping(Watch("kind", above=1.0, patience=2), num_prompt=3, tokens=4)
    for position, value in enumerate((2.0, 0.5, 1.5), start=3):  # never two in a row
        assert one_step(monkeypatch, scheduler, [7], position, value) == ([7], [])
    seen, told = one_step(monkeypatch, scheduler, [7], 6, 1.5)
    assert seen == [], "the token behind the stop is shown"
    assert scheduler.ended == [("one", RequestStatus.FINISHED_STOPPED)]
    assert scheduler.evicted == set(), "what was computed is right and stays in the prefix cache"
    ((ended,),) = (told,)
    assert (ended.finish_reason, ended.stop_reason) == (FinishReason.STOP, "vllm_steer:kind")


def test_no_request_s_blocks_are_looked_at_where_nothing_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = stopping(Watch("kind", above=1.0), num_prompt=3, tokens=4)
    asked: list[str] = []
    scheduler.kv_cache_manager.get_block_ids = asked.append
    one_step(monkeypatch, scheduler, [7], 3, 0.0)
    one_step(monkeypatch, scheduler, [7], 4, 2.0)
    assert scheduler.ended == [("one", RequestStatus.FINISHED_STOPPED)]
    assert asked == []


def test_a_stop_within_drafts_shows_the_accepted_ones_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = stopping(Watch("kind", below=0.0), num_prompt=3, tokens=4)
    # Input: token 3 and drafts 4, 5, 6, of which two are accepted; the third would stop and was rejected.
    assert one_step(monkeypatch, scheduler, [7, 8, 9], 3, 1.0, 1.0, 1.0, -1.0) == ([7, 8, 9], [])
    seen, told = one_step(monkeypatch, scheduler, [7, 8, 9], 6, 1.0, -1.0, 1.0)
    assert seen == [7], "token 7 is the draft that stops"
    assert [one.stop_reason for one in told] == ["vllm_steer:kind"]


def test_tokens_that_are_computed_again_are_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = stopping(Watch("kind", above=0.0, patience=3), num_prompt=3, tokens=4)
    one_step(monkeypatch, scheduler, [7], 3, 1.0)
    one_step(monkeypatch, scheduler, [7], 4, 1.0)
    assert one_step(monkeypatch, scheduler, [], 3, 1.0, 1.0) == ([], [])  # after a preemption, in two chunks
    seen, told = one_step(monkeypatch, scheduler, [7], 5, 1.0)
    assert (seen, len(told)) == ([], 1)


def test_values_of_tokens_that_the_scheduler_drops_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = stopping(
        Watch("kind", above=0.0), num_prompt=3, tokens=4, num_stale_output_tokens=1, drop_stale_output=True
    )
    assert one_step(monkeypatch, scheduler, [7], 3, 1.0) == ([7], [])
    scheduler.requests["one"].num_stale_output_tokens = 0
    scheduler.requests["one"].num_tokens = 4
    assert one_step(monkeypatch, scheduler, [7], 3, -1.0) == ([7], [])


def test_a_stop_without_a_column_ends_its_request_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = stopping(Watch("kind", above=0.0), num_prompt=3, tokens=3)
    output = ModelRunnerOutput(["one"], {"one": 0}, [[7]])
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, "update_from_output", lambda self, scheduled, output: {})
        early_ends.install()
        told = Scheduler.update_from_output(scheduler, None, step_marks._marked(output, StepMarks(unwatched=["one"])))
    assert scheduler.ended == [("one", RequestStatus.FINISHED_ERROR)]
    refusal = early_ends.refusal(told[0].outputs[0].stop_reason)
    assert isinstance(refusal, NoTraceColumn)
    assert refusal.status == 503
    assert early_ends.refusal("vllm_steer: something else") is None


class LateOutput(AsyncModelRunnerOutput):
    """An output whose tokens and marks come with ``get_output``, and not before."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer

    def get_output(self) -> ModelRunnerOutput:
        self.buffer[2] = 1
        return ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1})

    def get_kv_connector_output(self) -> str:  # which vLLM asks for from 0.33 on
        return "transferred"


@pytest.mark.parametrize("is_late", [False, True])
def test_a_worker_hands_over_the_marks_of_the_very_step(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SteerSettings(layers=(1,))
    runner = StandInRunner(settings)
    runner.vllm_config.model_config.dtype = torch.float16
    runner.load_model()
    buffer = runner.steering.buffers.cut_R
    monkeypatch.setattr(worker_steering, "start_copy", lambda values: (values, lambda: True))
    output: Any = LateOutput(buffer) if is_late else ModelRunnerOutput(["a", "b"], {"a": 0, "b": 1})

    def sample_tokens(grammar: Any) -> Any:
        if not is_late:
            buffer[2] = 1
        return output

    worker = SimpleNamespace(model_runner=runner, execute_model=lambda scheduled: None, sample_tokens=sample_tokens)
    step_marks.watch(worker)
    for is_steered, expected in ((True, ["b"]), (False, [])):
        monkeypatch.setattr(runner.steering.planner, "rows", lambda: {"a": (0, 1), "b": (-1, 2)})
        runner.steering._may_cut = is_steered
        assert worker.execute_model(None) is None
        told = worker.sample_tokens(None)
        assert isinstance(told, AsyncModelRunnerOutput) == is_late  # vLLM tells by it whether to wait
        if is_late:
            assert told.get_kv_connector_output() == "transferred"
            told = told.get_output()
        assert getattr(told, "vllm_steer_marks", StepMarks()).cut_off == expected


def test_a_worker_whose_stream_has_room_is_left_alone() -> None:
    runner = StandInRunner(SteerSettings(layers=(1,), trace_columns=0))
    runner.load_model()
    worker = SimpleNamespace(model_runner=runner, execute_model="execute", sample_tokens="sample")
    step_marks.watch(worker)
    assert (worker.execute_model, worker.sample_tokens) == ("execute", "sample")


@pytest.mark.parametrize(("dtype", "can_cut"), [(torch.float16, True), (torch.bfloat16, False)])
def test_marks_are_read_behind_the_steps_that_steer_a_float16_stream_and_no_others(
    dtype: torch.dtype, can_cut: bool
) -> None:
    settings = SteerSettings(layers=(1,))
    runner, admission = StandInRunner(settings), Admission(settings, SIZE)
    runner.vllm_config.model_config.dtype = dtype
    runner.load_model()
    runner.steering.write_directions(admission.registry.register([KIND]))  # type: ignore[attr-defined]
    resolved = admission.resolve("steered", RequestSpec((Steering("kind", 1.0),)), 3)
    params = SimpleNamespace(extra_args={RESOLVED_KEY: resolved.dump()}, stop=[])
    new = SimpleNamespace(req_id="steered", sampling_params=params)
    runner.prepare([("steered", 0, 3), ("plain", 0, 2)], new=[new])
    marks = runner.steering.start_reading_marks()
    assert (marks is not None) == can_cut
    if marks is not None:
        runner.steering.buffers.cut_R[runner.steering.planner.rows()["steered"][-1]] = 1
        assert marks() == StepMarks(cut_off=["steered"])
    assert runner.steering.start_reading_marks() is None, "marks are read once a step"
    runner.prepare([("plain", 2, 1)])
    assert runner.steering.start_reading_marks() is None, "this step steers nothing"


def test_a_row_that_changes_hands_begins_without_a_mark() -> None:
    settings = SteerSettings(layers=(1,))
    runner, admission = StandInRunner(settings, requests=1), Admission(settings, SIZE)
    runner.vllm_config.model_config.dtype = torch.float16
    runner.load_model()
    runner.steering.write_directions(admission.registry.register([KIND]))  # type: ignore[attr-defined]
    for name in ("first", "second"):
        resolved = admission.resolve(name, RequestSpec((Steering("kind", 1.0),)), 3)
        params = SimpleNamespace(extra_args={RESOLVED_KEY: resolved.dump()}, stop=[])
        runner.prepare([(name, 0, 3)], new=[SimpleNamespace(req_id=name, sampling_params=params)])
        marks = runner.steering.start_reading_marks()
        assert marks is not None
        assert not marks()
        runner.steering.buffers.cut_R[:] = 1
        runner.steering.finish(name)
