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
from vllm_steer.engine import stream_overflow
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.engine.worker import cut_off_marks, worker_steering
from vllm_steer.schema import RequestSpec, Steering
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
        stream_overflow.install()
        told = Scheduler.update_from_output(scheduler, None, cut_off_marks._marked(output, marked))
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
    marked = cut_off_marks._marked(EMPTY_MODEL_RUNNER_OUTPUT, ["a"])
    assert marked is not EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "vllm_steer_cut_off")
    assert cut_off_marks._marked(EMPTY_MODEL_RUNNER_OUTPUT, []) is EMPTY_MODEL_RUNNER_OUTPUT


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
    cut_off_marks.watch(worker)
    for is_steered, expected in ((True, ["b"]), (False, [])):
        monkeypatch.setattr(runner.steering.planner, "rows", lambda: {"a": (0, 1), "b": (-1, 2)})
        runner.steering._may_cut = is_steered
        assert worker.execute_model(None) is None
        told = worker.sample_tokens(None)
        assert isinstance(told, AsyncModelRunnerOutput) == is_late  # vLLM tells by it whether to wait
        if is_late:
            assert told.get_kv_connector_output() == "transferred"
            told = told.get_output()
        assert getattr(told, "vllm_steer_cut_off", []) == expected


def test_a_worker_whose_stream_has_room_is_left_alone() -> None:
    runner = StandInRunner(SteerSettings(layers=(1,)))
    runner.load_model()
    worker = SimpleNamespace(model_runner=runner, execute_model="execute", sample_tokens="sample")
    cut_off_marks.watch(worker)
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
        assert marks() == ["steered"]
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
        assert marks() == []
        runner.steering.buffers.cut_R[:] = 1
        runner.steering.finish(name)
