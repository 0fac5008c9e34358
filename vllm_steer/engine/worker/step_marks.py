"""What a step has shown of requests that may have to end; a worker returns it with the output of the same step."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

from vllm_steer.engine.early_ends import MARKS, StepMarks
from vllm_steer.engine.patching import patch
from vllm_steer.engine.worker.worker_steering import WorkerSteering, steering_of

Marks = Callable[[], StepMarks]
"""To be called once the device has finished the step."""


def watch(worker: Any) -> None:
    """Make a worker return the marks of each step; call it once the worker's model is loaded.

    Patches ``execute_model`` and ``sample_tokens`` of this worker alone, if steps can have marks: its residual stream
    is float16, or there are trace columns.
    """
    steering = steering_of(worker.model_runner)
    if steering is None or not (steering.buffers.can_cut or steering.settings.trace_columns):
        return
    pending: list[Marks] = []
    EXECUTE_MODEL.install_on(worker, steering, pending)
    SAMPLE_TOKENS.install_on(worker, pending)


def _execute_model(original: Any, steering: WorkerSteering, pending: list[Marks]) -> Any:
    def execute_model(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        marks = steering.start_reading_marks()
        if marks is not None and output is None:  # sample_tokens will return the output
            pending.append(marks)
        elif marks is not None:
            return _with_marks(output, marks)
        return output

    return execute_model


def _sample_tokens(original: Any, pending: list[Marks]) -> Any:
    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        return _with_marks(output, pending.pop()) if pending else output

    return sample_tokens


@AsyncModelRunnerOutput.register
class _OutputWithMarks:
    """An output that has not arrived yet, with the marks, which arrive no later than the output.

    It is registered as a subclass and not derived: the output itself then answers whatever else a release of vLLM asks
    it for. Since 0.33 that is ``get_kv_connector_output``, which is abstract there.
    """

    def __init__(self, output: AsyncModelRunnerOutput, marks: Marks) -> None:
        self._output = output
        self._marks = marks

    def get_output(self) -> Any:
        return _marked(self._output.get_output(), self._marks())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def _with_marks(output: Any, marks: Marks) -> Any:
    if isinstance(output, AsyncModelRunnerOutput):
        return _OutputWithMarks(output, marks)
    return _marked(output, marks())


def _marked(output: Any, marks: StepMarks) -> Any:
    if not marks or output is None:
        return output
    output = copy(output)  # vLLM returns the same empty output for all steps without tokens
    MARKS.put(output, marks)
    return output


EXECUTE_MODEL, SAMPLE_TOKENS = (
    patch(
        WorkerBase,
        name,
        wrap,
        takes=None,
        why="Returns what the step has shown of requests that may have to end, with the output of the step.",
        gone_when="a worker can end one request.",
        when="each worker object of an engine with steer_config",
    )
    for name, wrap in (("execute_model", _execute_model), ("sample_tokens", _sample_tokens))
)
