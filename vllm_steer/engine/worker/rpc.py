"""Worker methods for ``collective_rpc``. Arguments and results are plain types that pass msgpack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.worker_base import WorkerBase

from vllm_steer.engine.patching import patch
from vllm_steer.engine.worker import step_marks
from vllm_steer.engine.worker.worker_steering import WorkerSteering, steering_of
from vllm_steer.engine.worker_answers import LiveTrace, ModelRecord, Readout
from vllm_steer.errors import NotConfigured, UnsupportedFeature
from vllm_steer.settings import SteerSettings


def install() -> None:
    """Add the methods to ``WorkerBase``, and make configured workers patch their runner."""
    for one in (INIT, WRITE, COLLECT, TRACES, MODEL):
        one.install()


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if SteerSettings.of(self.vllm_config.additional_config) is not None:
            if self.vllm_config.use_v2_model_runner:
                from vllm_steer.engine.worker import patch_v2_runner

                patch_v2_runner.install()
            else:
                from vllm_steer.engine.vllm_faults import cpu_seeds
                from vllm_steer.engine.worker import patch_classic_runner

                patch_classic_runner.install()
                cpu_seeds.install()
                if self.vllm_config.lora_config is not None:
                    from vllm_steer.engine.vllm_faults import cpu_lora

                    cpu_lora.install()
                if self.vllm_config.speculative_config is not None:
                    from vllm_steer.engine.vllm_faults import cpu_drafts

                    cpu_drafts.install()
            LOAD_MODEL.install_on(self, self)

    return __init__


def _checked(load_model: Any, worker: Any) -> Any:
    """One worker's ``load_model`` that fails unless it puts hooks on: a platform may bring its own runner."""

    def checked(*args: Any, **kwargs: Any) -> None:
        load_model(*args, **kwargs)
        if steering_of(worker.model_runner) is None:
            raise UnsupportedFeature(
                f"{type(worker.model_runner).__name__} has loaded its model and put no hooks on it; allowed: vLLM's "
                "own runners and subclasses that keep their load_model. Start the engine without steer_config."
            )
        step_marks.watch(worker)

    return checked


def write(worker: Any, slots: list[int], vectors: bytes) -> int:
    """Write vectors into the bank.

    RPCs run between steps, so no request sees a partial write.

    Args:
        worker: the vLLM worker.
        slots: the slot of each vector.
        vectors: the vectors, float32, one after another.

    Returns:
        The number of vectors.

    Raises:
        NotConfigured: the worker has no hooks.
    """
    _of(worker).write_vectors(slots, np.frombuffer(vectors, dtype="<f4").reshape(len(slots), -1))
    return len(slots)


def collect(worker: Any, samples: list[tuple[str, int, int]]) -> list[Readout | None] | None:
    """The readouts of samples, for the layers of this worker's pipeline stage.

    Args:
        worker: the vLLM worker.
        samples: (``Resolved.key``, sample index, ``computed_end`` of ``FinishedReadout.answer``) of each.

    Returns:
        ``FinishedReadout.answer`` and ``proof`` for each sample, None for one that is not here; or None from a worker
        that is not rank 0 of its tensor-parallel group. ``worker_answers.whole_readouts`` merges the stages.

    Raises:
        NotConfigured: the worker has no hooks.
    """
    if not _answers(worker):
        return None
    steering = _of(worker)
    steering.fetch()
    found = steering.find([(key, index) for key, index, _ in samples])
    if worker.device is not None and worker.device.type != "cpu":
        torch.accelerator.synchronize()  # the copies to the host were started without waiting for them
        steering.fetch()
    ends = (computed_end for _, _, computed_end in samples)
    return [
        None if one is None else {**one.answer(end), "proof": steering.proof}
        for one, end in zip(found, ends, strict=True)
    ]


def traces(worker: Any, samples: list[tuple[str, int, int]]) -> list[LiveTrace | None] | None:
    """The values known so far of the traces of running samples.

    Never waits for the device, so it can be called often: on an accelerator the values of the last steps may come with
    the next call. Asynchronous scheduling can add one token too many; the caller knows where a sample ended.

    Args:
        worker: the vLLM worker.
        samples: (``Resolved.key``, sample index, ``start``) of each; ``start`` counts from the first token of the
            readout's span.

    Returns:
        For each sample (name, values from ``start`` on) of each name of ``Readout.trace`` that is traced on this
        worker's pipeline stage; ``{"error": reason}`` if the trace failed; None if the sample has not begun or is over,
        since its trace then comes with its readout. Or None from a worker that is not rank 0 of its tensor-parallel
        group. ``worker_answers.whole_traces`` merges the stages.

    Raises:
        NotConfigured: the worker has no hooks.
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
            known = [one for one in zip(names, trace.values(start).tolist(), strict=True) if one[0]]
            answers.append(known if trace.failure is None else {"error": trace.failure})
    return answers


def model(worker: Any) -> ModelRecord | None:
    """How the layers of this worker's pipeline stage return the residual stream, and why that is taken to be right.

    Args:
        worker: the vLLM worker.

    Returns:
        ``architecture``, ``proof`` and ``experiment``, the record of the one at start-up; or None from a worker that is
        not rank 0 of its tensor-parallel group. ``worker_answers.whole_model`` merges the stages.

    Raises:
        NotConfigured: the worker has no hooks.
    """
    if not _answers(worker):
        return None
    steering = _of(worker)
    return {
        "architecture": worker.vllm_config.model_config.architectures[0],
        "proof": steering.proof,
        "experiment": steering.findings.as_json(),
    }


def _answers(worker: Any) -> bool:
    """Whether this worker answers for its tensor-parallel group, whose members all hold the same stream."""
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
    why="A platform may bring its own runner, which would get no hooks: then the engine must not start.",
    gone_when="a plugin is called with the loaded model.",
    when="each worker object of an engine with steer_config",
)
WRITE, COLLECT, TRACES, MODEL = (
    patch(
        WorkerBase,
        f"vllm_steer_{method.__name__}",
        _adding(method),
        takes=None,
        why="A method for collective_rpc to find.",
        gone_when="plugins can add RPC methods without worker_extension_cls.",
    )
    for method in (write, collect, traces, model)
)
