"""Stand-ins for vLLM's classic runner, its worker and a model.

The methods that the plugin wraps carry vLLM's names and signatures and are wrapped by the plugin's own wrappers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from vllm_steer.engine.worker import patch_classic_runner, worker_steering
from vllm_steer.engine.worker.layer_experiment import Findings, Layer, class_path
from vllm_steer.engine.worker.worker_steering import WorkerSteering
from vllm_steer.settings import CONFIG_KEY, SteerSettings

SIZE, BLOCKS = 8, 5


class LlamaDecoderLayer(nn.Module):
    """Adds ``added_TD`` to the stream, which is hidden + residual as in vLLM's class of this name."""

    def forward(
        self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor, added_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (hidden, residual), whose sum is the new stream."""
        return added_TD.clone(), hidden_TD + residual_TD


LlamaDecoderLayer.__module__ = "vllm.model_executor.models.llama"  # the family table goes by the full name


class StandInModel(nn.Module):
    """A model without attention: the stream of a token follows from that token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaDecoderLayer() for _ in range(BLOCKS))

    def forward(self, contents_TBD: torch.Tensor) -> list[torch.Tensor]:
        """The stream after each block; ``contents_TBD`` holds the embedding and each block's addition."""
        hidden_TD, residual_TD = contents_TBD[:, 0].clone(), torch.zeros_like(contents_TBD[:, 0])
        streams = []
        for index, layer in enumerate(self.layers):
            hidden_TD, residual_TD = layer(hidden_TD, residual_TD, contents_TBD[:, index + 1])
            streams.append(hidden_TD + residual_TD)
        return streams


def plain_streams(contents: Any) -> list[torch.Tensor]:
    """The streams after each block, of a model without hooks."""
    streams: list[torch.Tensor] = StandInModel()(torch.from_numpy(contents))
    return streams


def examined(model: Any, runner: Any) -> tuple[dict[int, nn.Module], Findings]:
    """What the experiment at start-up, which needs a model of vLLM, would find in one whose layers are fused."""
    blocks = dict(enumerate(model.layers))
    layers = (Layer(number, class_path(block), "fused", 0.0, 1.0, 1.0) for number, block in blocks.items())
    return blocks, Findings(tuple(layers), len(blocks), 0.0, 1e-4, 1e-3, 0.0)


class StandInRunner:
    """A runner that takes its batch from the test instead of keeping one.

    Args:
        settings: the engine's settings; None leaves the plugin unconfigured.
        requests, tokens: the most in one step.
        rows: the most in one forward pass, padding included.
        drafts: the most of one request in one step.
    """

    def __init__(
        self, settings: SteerSettings | None, requests: int = 3, tokens: int = 24, rows: int = 28, drafts: int = 0
    ) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={} if settings is None else {CONFIG_KEY: settings.as_config()},
            model_config=SimpleNamespace(
                architecture="LlamaForCausalLM", get_hidden_size=lambda: SIZE, dtype=torch.float32
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=tokens),
            num_speculative_tokens=drafts,
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[rows]),
        )
        self.device = torch.device("cpu")
        self.input_batch: Any = None
        self.streams: list[torch.Tensor] = []

    @property
    def steering(self) -> WorkerSteering:
        """The steering that the plugin has put on this runner."""
        steering: WorkerSteering = self.vllm_steer  # type: ignore[attr-defined]  # the plugin puts it there
        return steering

    def get_model(self) -> nn.Module:
        """The model, as vLLM's runner gives it."""
        return self.model

    def load_model(self) -> None:
        """Make the model; the plugin's wrapper puts hooks into it."""
        with mock.patch.object(worker_steering, "examine", examined):
            self._load_model()

    def _load_model(self) -> None:
        self.model = StandInModel()

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> None:
        """``prepare`` has made the batch already."""

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        """The stand-in keeps nothing of a request."""

    def _dummy_run(self, contents: Any) -> None:
        self.forward(contents)

    _load_model = patch_classic_runner._load_model(_load_model)
    _prepare_inputs = patch_classic_runner._prepare_inputs(_prepare_inputs)
    _on_request_state_removed = patch_classic_runner._on_request_state_removed(_on_request_state_removed)
    _dummy_run = patch_classic_runner._dummy_run(_dummy_run)

    def prepare(
        self,
        batch: Sequence[tuple[str, int, int]],
        new: Sequence[Any] = (),
        preempted: Collection[str] = (),
        drafts: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """Prepare a step of (request id, computed, scheduled) in this order; older rows follow in vLLM's arrays."""
        ids, computed, scheduled = ([one[i] for one in batch] for i in range(3))
        self.input_batch = SimpleNamespace(
            num_reqs=len(batch), req_ids=[*ids, "gone"], num_computed_tokens_cpu=np.array([*computed, 99], np.int32)
        )
        output = SimpleNamespace(
            scheduled_new_reqs=list(new), preempted_req_ids=set(preempted), scheduled_spec_decode_tokens=drafts
        )
        self._prepare_inputs(output, np.array(scheduled, np.int32))

    def forward(self, contents: Any) -> None:
        """Run the model on float32 (T, BLOCKS + 1, SIZE) contents and keep its streams."""
        with torch.inference_mode():
            self.streams = self.model(torch.from_numpy(contents))


class StandInWorker:
    """The worker on which ``collective_rpc`` calls functions."""

    def __init__(self, runner: StandInRunner) -> None:
        self.device, self.model_runner = runner.device, runner
        self.rank, self.parallel_config = 0, SimpleNamespace(tensor_parallel_size=1)
        self.execute_model = self.sample_tokens = lambda _: None
