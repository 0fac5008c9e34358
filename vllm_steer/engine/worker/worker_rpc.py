"""The methods that ``collective_rpc`` finds on a worker. Arguments and results are plain types: they cross msgpack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.worker_base import WorkerBase

from vllm_steer.directions import Direction
from vllm_steer.engine.patching import patch
from vllm_steer.engine.worker import cut_off_marks
from vllm_steer.engine.worker.worker_steering import WorkerSteering, steering_of
from vllm_steer.engine.worker_answers import LiveTrace, Readout
from vllm_steer.errors import NotConfigured, UnsupportedFeature
from vllm_steer.settings import SteerSettings


def install() -> None:
    """Install the methods on ``WorkerBase``, and let configured workers patch their runner."""
    for one in (INIT, WRITE, COLLECT, TRACES):
        one.install()


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if SteerSettings.of(self.vllm_config.additional_config) is not None:
            if self.vllm_config.use_v2_model_runner:
                from vllm_steer.engine.worker import runner_v2

                runner_v2.install()
            else:
                from vllm_steer.engine.vllm_faults import cpu_seeds
                from vllm_steer.engine.worker import runner_v1

                runner_v1.install()
                cpu_seeds.install()
                if self.vllm_config.lora_config is not None:
                    from vllm_steer.engine.vllm_faults import cpu_lora

                    cpu_lora.install()
            LOAD_MODEL.install_on(self, self)

    return __init__


def _checked(load_model: Any, worker: Any) -> Any:
    """``load_model`` of one worker, which must leave hooks behind: a platform may bring a runner of its own."""

    def checked(*args: Any, **kwargs: Any) -> None:
        load_model(*args, **kwargs)
        if steering_of(worker.model_runner) is None:
            raise UnsupportedFeature(
                f"{type(worker.model_runner).__name__} has loaded its model and put no hooks on it; allowed: vLLM's "
                "own runners and what inherits their load_model. Start the engine without steer_config."
            )
        cut_off_marks.watch(worker)

    return checked


def write(worker: Any, directions: list[tuple[int, str, int, bytes]]) -> int:
    """Write directions, each (slot, name, layer, float32 bytes), into the bank; answers how many.

    RPCs run between steps, so no request sees half of it.
    """
    _of(worker).write_directions(
        [
            (slot, Direction(name, layer, np.frombuffer(vector, dtype=np.float32)))
            for slot, name, layer, vector in directions
        ]
    )
    return len(directions)


def collect(worker: Any, samples: list[tuple[str, int, int]]) -> list[Readout | None] | None:
    """The readouts of samples, each (``Resolved.key``, sample index, computed end); None where not here.

    Of the layers that this worker's pipeline stage holds; ``stages.whole_readouts`` puts them together.
    """
    if not _answers(worker):
        return None
    steering = _of(worker)
    steering.fetch()
    found = steering.find([(key, index) for key, index, _ in samples])
    if worker.device is not None and worker.device.type != "cpu":
        torch.accelerator.synchronize()  # all copies to the host, the last ones just now, were started without waiting
        steering.fetch()
    ends = (computed_end for _, _, computed_end in samples)
    return [None if one is None else one.answer(end) for one, end in zip(found, ends, strict=True)]


def traces(worker: Any, samples: list[tuple[str, int, int]]) -> list[LiveTrace | None] | None:
    """What is known by now of the traces of samples that are still under way.

    Never waits for the device, so that it can be asked often: on an accelerator the values of the last steps may come
    with the next call. A token too many (asynchronous scheduling) is among them; the caller knows where a sample ended.

    Args:
        samples: (``Resolved.key``, sample index, ``start``) of each, ``start`` counted from the first token of the
            readout's span.

    Returns:
        For each sample (name, values from ``start`` on) of each name of ``Readout.trace`` that is traced on this
        worker's pipeline stage; ``{"error": reason}``; or None for one that has not begun or is over, whose trace comes
        with its readout. ``stages.whole_traces`` puts them together.
    """
    if not _answers(worker):
        return None
    steering = _of(worker)
    steering.fetch()
    answers: list[LiveTrace | None] = []
    for key, index, start in samples:
        live = steering.trace(key, index)
        if live is None:
            answers.append(None)
        else:
            names, trace = live
            known = list(zip(names, trace.values(start).tolist(), strict=True))
            answers.append(known if trace.failure is None else {"error": trace.failure})
    return answers


def _answers(worker: Any) -> bool:
    """Whether it is this worker that answers for its tensor-parallel group, which all hold the same stream."""
    return bool(worker.rank % worker.parallel_config.tensor_parallel_size == 0)


def _of(worker: Any) -> WorkerSteering:
    steering = steering_of(worker.model_runner)
    if steering is None:
        raise NotConfigured(
            "this worker has no hooks; start the engine with additional_config=steer_config(layers=[...])."
        )
    return steering


def _adding(method: Any) -> Any:
    def wrap(_: None) -> Any:
        return method

    return wrap


INIT = patch(
    WorkerBase,
    "__init__",
    _init,
    takes="self, ...",
    why="The first worker of a configured engine installs the runner's patches.",
    gone_when="a plugin is called in each worker once its configuration is known.",
)
LOAD_MODEL = patch(
    WorkerBase,
    "load_model",
    _checked,
    takes=None,
    why="A platform may bring a runner of its own, on which no hooks would be: then the engine must not start.",
    gone_when="a plugin is called with the loaded model.",
    when="each worker object of an engine with steer_config",
)
WRITE, COLLECT, TRACES = (
    patch(
        WorkerBase,
        f"vllm_steer_{method.__name__}",
        _adding(method),
        takes=None,
        why="A method for collective_rpc to find.",
        gone_when="plugins can add RPC methods without worker_extension_cls.",
    )
    for method in (write, collect, traces)
)
