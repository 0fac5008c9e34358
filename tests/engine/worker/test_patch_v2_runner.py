"""The V2 runner's adapter over random schedules: every token of every step, and every readout, against brute force.

Real parts: vLLM's request states, its `GPUModelRunner`'s way from a scheduler output to a batch (finish, add, update,
order), its `InputBatch` and its choice of the model's state. Fakes: the kernels below them (staged writes to the device
are dropped), block tables, the configuration, the scheduler and the model, whose tokens do not see each other.
`tests/engine/exact/on_v2_runner.py` tests the runner with its kernels.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import buffer_utils, model_states
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from tests.support.random_schedules import (
    DIRECTIONS,
    HOOKED,
    MAX_REQUESTS,
    MAX_TOKENS,
    SIZE,
    VOCAB,
    FakeScheduler,
    Job,
    random_jobs,
)
from tests.support.runner_stand_ins import examined
from vllm_steer import Direction, steer_config
from vllm_steer.engine import startup_checks
from vllm_steer.engine.layer_classes import LAYER_CLASSES, LayerClass
from vllm_steer.engine.resolved_spec import Resolved
from vllm_steer.engine.worker import patch_v2_runner, worker_steering
from vllm_steer.engine.worker.worker_steering import WorkerSteering, steering_of

MAX_LEN, LARGEST_GRAPH = 40, 30
# float32 sums of streams of a norm of about 5; a token with a neighbour's row errs by 0.1 and more
TOLERANCE = 1e-4


class ToyLayer(nn.Module):
    """Returns (h, r) as vLLM's fused layers do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator) / 3, requires_grad=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden if residual is None else hidden + residual
        return torch.tanh(stream @ self.weight), stream.clone()


class ToyModel(nn.Module):
    """Each token's stream depends on its id and position alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tokens = nn.Parameter(torch.randn(VOCAB, SIZE, generator=generator), requires_grad=False)
        self.positions = nn.Parameter(torch.randn(MAX_LEN, SIZE, generator=generator), requires_grad=False)
        self.layers = nn.ModuleList(ToyLayer(seed) for seed in range(1, 4))

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.tokens[ids] + self.positions[positions], None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual

    def brute_force(self, token: int, position: int, request: Resolved | None) -> list[npt.NDArray[np.float64]]:
        """The stream of one token after each layer."""
        stream = self.tokens[token].double().numpy() + self.positions[position].double().numpy()
        streams = []
        for number, layer in enumerate(self.layers):
            stream = stream + np.tanh(stream @ layer.weight.double().numpy())
            if request is not None and number in HOOKED:
                entries = [window for window in request.windows if window.start <= position][-1].entries
                for index, slot, a, b, *_ in entries:
                    if index == HOOKED.index(number):
                        direction = DIRECTIONS[index, slot]
                        stream = stream + (a + b * (stream @ direction)) * direction
            streams.append(stream)
        return streams


class HostRequestState(RequestState):
    """vLLM's request states without the kernel that copies them to a device."""

    def apply_staged_writes(self) -> None:
        for staged in (self.total_len, self.all_token_ids, self.num_computed_tokens):
            staged.clear_staged_writes()


class RunnerWithoutKernels(GPUModelRunner):
    """The runner's way from a scheduler output to the batch, and the model state that it would have made."""

    def __init__(self, vllm_config: Any, model: ToyModel) -> None:
        device = torch.device("cpu")
        self.model, self.device = model, device
        self.model_state = model_states.init_model_state(vllm_config, model, None, device)
        self.req_states = HostRequestState(MAX_REQUESTS, MAX_LEN, MAX_TOKENS, 0, VOCAB, device)
        self.lora_state = LoraState(MAX_REQUESTS)
        self.block_tables = SimpleNamespace(append_block_ids=lambda *args, **kwargs: None)
        self.pooling_runner = self.pp_handler = self.encoder_cache = self.prompt_logprobs_worker = None
        self.adaptive_verification = self.pcp_manager = self.sampler = None
        self.is_last_pp_rank = self.use_pp = False
        self.decode_query_len = 1
        self._buffers = InputBuffers(MAX_REQUESTS, LARGEST_GRAPH, device)

    def step(self, output: SchedulerOutput, padding: int) -> InputBatch | None:
        """All of `execute_model` that precedes the forward pass; None where no token was scheduled."""
        self.finish_requests(output)
        self.add_requests(output)
        self.update_requests(output)
        if not output.num_scheduled_tokens:
            return None
        state, _ = self.gather_batch_req_state(output, dummy_run=False)
        dummy = InputBatch.make_dummy(len(state.req_ids), state.num_tokens, self._buffers)
        batch = replace(
            dummy,
            req_ids=state.req_ids,
            idx_mapping_np=state.idx_mapping_np,
            num_scheduled_tokens=state.num_scheduled_tokens,
            num_tokens_after_padding=min(state.num_tokens + padding, LARGEST_GRAPH),
            num_computed_tokens_np=self.req_states.num_computed_tokens_np[state.idx_mapping_np],
        )
        self.model_state.prepare_inputs(batch, self.req_states)
        return batch

    def dummy_run(self, num_reqs: int, num_tokens: int) -> None:
        self.model_state.prepare_inputs(InputBatch.make_dummy(num_reqs, num_tokens, self._buffers), self.req_states)
        self.run_untouched(num_tokens)

    def capture(self, num_reqs: int, num_tokens: int) -> None:
        self.model_state.prepare_dummy_inputs(num_reqs, num_tokens)
        self.run_untouched(num_tokens)

    def run_untouched(self, num_tokens: int) -> None:
        """A forward pass without a request."""
        ids = torch.full((num_tokens,), 3)
        streams = self.model(ids, torch.zeros_like(ids))
        expected = self.model.brute_force(3, 0, None)[-1]
        assert np.abs(streams.numpy() - expected).max() < TOLERANCE


def configuration() -> Any:
    model_config = SimpleNamespace(
        architecture="Toy",
        dtype=torch.float32,
        max_model_len=MAX_LEN,
        enable_prompt_embeds=False,
        uses_mrope=False,
        is_hybrid=False,
        is_attention_free=False,
        get_hidden_size=lambda: SIZE,
        get_inputs_embeds_size=lambda: SIZE,
    )
    return SimpleNamespace(
        additional_config=steer_config(layers=HOOKED, trace_columns=2, max_rows=99),
        model_config=model_config,
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQUESTS, max_num_batched_tokens=MAX_TOKENS),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[8, LARGEST_GRAPH], static_forward_context={}),
        num_speculative_tokens=0,
    )


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> RunnerWithoutKernels:
    toy_layer = f"{ToyLayer.__module__}.{ToyLayer.__qualname__}"
    monkeypatch.setitem(LAYER_CLASSES, toy_layer, LayerClass(toy_layer, "fused", ("Toy",)))
    # the experiment needs vLLM's forward context and process groups
    monkeypatch.setattr(worker_steering, "examine", examined)
    # vLLM's own stand-in for memory that host and device share, with which its V2 runner runs on a CPU
    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    patch_v2_runner.install()
    made = RunnerWithoutKernels(configuration(), ToyModel())
    named = [(slot, Direction(str(slot), HOOKED[index], v)) for (index, slot), v in DIRECTIONS.items()]
    steering(made).write_directions(named)
    return made


def steering(runner: RunnerWithoutKernels) -> WorkerSteering:
    found = steering_of(runner)
    assert found is not None
    return found


def check_step(runner: RunnerWithoutKernels, batch: InputBatch, jobs: dict[str, Job]) -> None:
    """Run the batch, padding included, and compare each token's stream."""
    placed = [
        (jobs[request_id], position)
        for request_id, start, count in zip(
            batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens, strict=True
        )
        for position in range(start, start + count)
    ]
    padding = [3] * (batch.num_tokens_after_padding - batch.num_tokens)
    ids = torch.tensor([job.tokens[position] for job, position in placed] + padding)
    positions = torch.tensor([position for _, position in placed] + [0] * len(padding))
    streams = runner.model(ids, positions).numpy()
    for (job, position), stream in zip(placed, streams, strict=False):
        asked = job.resolved if job.is_steered else None
        expected = runner.model.brute_force(job.tokens[position], position, asked)[-1]
        assert np.abs(stream - expected).max() < TOLERANCE, (job, position)
    untouched = runner.model.brute_force(3, 0, None)[-1]
    assert all(np.abs(stream - untouched).max() < TOLERANCE for stream in streams[len(placed) :])


def check_readout(runner: RunnerWithoutKernels, job: Job) -> None:
    readout = job.resolved.readout if job.is_steered else None
    steering(runner).fetch()  # as the worker does when it is asked
    (found,) = steering(runner).find([(job.resolved.request_id, 0)])
    if readout is None:
        assert found is None
        return
    computed_end = len(job.tokens) - 1
    positions = range(readout.first, computed_end if readout.end is None else readout.end)
    assert found is not None
    answer = found.answer(computed_end)
    assert answer["num_tokens"] == len(positions), answer
    streams = [runner.model.brute_force(job.tokens[p], p, job.resolved) for p in positions]
    assert answer["trace_error"] is None
    assert [layer for layer, *_ in answer["rows"]] == (HOOKED if readout.pool == "rows" else [])
    for layer, _, rows in answer["rows"]:
        expected = np.stack([stream[layer] for stream in streams])
        assert np.abs(np.frombuffer(rows, np.float32).reshape(-1, SIZE) - expected).max() < TOLERANCE
    if readout.pool == "mean":
        means = np.frombuffer(answer["pooled"], np.float32).reshape(len(HOOKED), SIZE)
        for index, layer in enumerate(HOOKED):
            assert np.abs(means[index] - np.mean([stream[layer] for stream in streams], axis=0)).max() < TOLERANCE
    for (_, index, slot, *_), (_, values) in zip(readout.trace, answer["trace"], strict=True):
        expected = [stream[HOOKED[index]] @ DIRECTIONS[index, slot] for stream in streams]
        assert np.abs(np.frombuffer(values, np.float32) - expected).max() < TOLERANCE


def test_every_token_and_every_readout_of_random_schedules(runner: RunnerWithoutKernels) -> None:
    counted = Counter[str]()
    for seed in range(8):
        jobs = random_jobs(seed, count=20)
        by_id, scheduler = {job.request_id: job for job in jobs}, FakeScheduler(seed, jobs)
        unheard: list[Job] = []  # finished, but the runner does not know it yet
        while scheduler.running or scheduler.waiting or scheduler.ended:
            if scheduler.rng.random() < 0.2:
                runner.dummy_run(num_reqs=2, num_tokens=7)
                runner.capture(num_reqs=3, num_tokens=LARGEST_GRAPH)
                counted["dummy run"] += 1
            if scheduler.rng.random() < 0.05:
                scheduler.abort_one()
            output = scheduler.schedule()
            padding = int(scheduler.rng.integers(0, 6))
            batch = runner.step(output, padding)
            # A preempted request keeps its trace columns, but no accumulator that others need.
            assert not {job.request_id for job in scheduler.waiting} & set(steering(runner).planner.poolings)
            if batch is not None:
                check_step(runner, batch, by_id)
                counted["reordered"] += batch.req_ids != list(output.num_scheduled_tokens)
            for job in unheard:  # the step has told the runner
                check_readout(runner, job)
            unheard = scheduler.update(output)
            if unheard and scheduler.rng.random() < 0.5:  # asked before the runner has heard of the end
                for job in unheard:
                    check_readout(runner, job)
        counted += scheduler.counted
        assert not steering(runner).planner.requests
        assert not steering(runner).planner.poolings
    assert all(
        counted[event] > 0
        for event in (
            "preempted while generating",
            "one token too many",
            "aborted",
            "aborted while preempted",
            "dummy run",
            "reordered",
        )
    ), counted


def test_the_state_is_the_models_own_with_steering_before_it(runner: RunnerWithoutKernels) -> None:
    assert [cls.__name__ for cls in type(runner.model_state).__mro__[1:4]] == [
        "SteeringState",
        "DefaultModelState",
        "ModelState",
    ]
    assert type(runner.model_state).supports_prompt_embeds is DefaultModelState.supports_prompt_embeds


def test_an_engine_without_settings_gets_the_models_own_state() -> None:
    patch_v2_runner.install()
    unconfigured = configuration()
    unconfigured.additional_config = {}
    assert model_states.resolve_model_state_cls(unconfigured, ToyModel()) is DefaultModelState


def test_what_is_not_exact_on_this_runner_is_refused_by_name() -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=2)
    asked = SimpleNamespace(
        use_v2_model_runner=True, speculative_config=object(), lora_config=object(), parallel_config=parallel
    )
    refused = [one for one in startup_checks._features_of_v2(asked) if one.is_on]
    assert [one.feature.split(" on ")[0] for one in refused] == [
        "speculative decoding",
        "LoRA",
        "pipeline parallelism",
    ]
    assert all("VLLM_USE_V2_MODEL_RUNNER=0" in one.do for one in refused)
    asked.use_v2_model_runner = False
    assert not startup_checks._features_of_v2(asked)


def test_vllm_has_the_signatures_that_the_adapter_relies_on() -> None:
    expected = {
        ModelState.__init__: ["self", "vllm_config", "model", "encoder_cache", "device"],
        ModelState.add_request: ["self", "req_index", "new_req_data"],
        ModelState.prepare_inputs: ["self", "input_batch", "req_states"],
        ModelState.prepare_dummy_inputs: ["self", "num_reqs", "num_tokens"],
        inspect.unwrap(model_states.resolve_model_state_cls): ["vllm_config", "model"],
        inspect.unwrap(GPUModelRunner.finish_requests): ["self", "scheduler_output"],
    }
    for function, parameters in expected.items():
        assert list(inspect.signature(function).parameters) == parameters, function
    assert {"req_id", "sampling_params"} <= {field.name for field in fields(NewRequestData)}
    assert {"preempted_req_ids", "finished_req_ids"} <= {field.name for field in fields(SchedulerOutput)}
    assert {"req_ids", "num_computed_tokens_np", "num_scheduled_tokens"} <= {f.name for f in fields(InputBatch)}
    # Looked up when it is called, so that replacing it in the module is enough.
    assert "resolve_model_state_cls" in model_states.init_model_state.__code__.co_names
    # The only model state there is, the last call before the forward pass, and where requests end.
    called = inspect.unwrap(GPUModelRunner.execute_model).__code__.co_names
    assert {"prepare_inputs", "finish_requests", "add_requests"} <= set(called)
