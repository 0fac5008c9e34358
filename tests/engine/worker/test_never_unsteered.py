"""Nothing runs silently unsteered on a worker, whatever is broken before or in it.

No request can cause the faults here: a bank that differs from the one the front end expects, a model without hooks, a
step that the planner did not see. So they stop the engine, or fail the readout with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.runner_stand_ins import BLOCKS, SIZE, LlamaDecoderLayer, StandInModel, StandInRunner, StandInWorker
from vllm_steer import Direction, Readout, Steering, errors, save_directions
from vllm_steer.engine import prefix_cache
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.engine.worker import rpc
from vllm_steer.plan.entry_rows import Entry, pack
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.settings import SteerSettings

LAYER, PROMPT_LEN = 1, 3
SETTINGS = SteerSettings(layers=(LAYER, 3))
SPEC = RequestSpec((Steering("kind", 2.0),), Readout([LAYER], span="all"))
VECTORS = np.random.default_rng(0).standard_normal((2, SIZE))
KIND_DIRECTION, OTHER = (Direction("kind", LAYER, vector).normalised() for vector in VECTORS)


class Engine:
    """A front end and a runner that have both started, with ``kind`` registered on both sides."""

    def __init__(self) -> None:
        self.admission = Admission(SETTINGS, SIZE)
        self.runner = StandInRunner(SETTINGS)
        self.runner.load_model()
        self.runner.steering.write_directions(self.admission.registry.register([KIND_DIRECTION]))  # type: ignore[attr-defined]

    def extra(self) -> dict[str, Any]:
        return {WIRE_KEY: SPEC.dumps(), RESOLVED_KEY: self.admission.resolve("r", SPEC, PROMPT_LEN).dump()}

    def start(self, extra: dict[str, Any], tokens: int = PROMPT_LEN) -> None:
        new = SimpleNamespace(req_id="r-0", sampling_params=SimpleNamespace(extra_args=extra, stop=[]))
        self.runner.prepare([("r-0", 0, tokens)], new=[new])

    def answer(self, computed: int) -> dict[str, Any]:
        (answer,) = rpc.collect(StandInWorker(self.runner), [("r", 0, computed)])
        return answer


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_what_admission_resolved_is_taken(engine: Engine) -> None:
    """Otherwise the refusals below could have an unintended reason."""
    engine.start(engine.extra())
    contents = np.random.default_rng(1).standard_normal((PROMPT_LEN, BLOCKS + 1, SIZE)).astype(np.float32)
    engine.runner.forward(contents)
    assert engine.answer(PROMPT_LEN)["num_tokens"] == PROMPT_LEN


def test_a_spec_that_admission_has_not_resolved_stops_the_engine(engine: Engine) -> None:
    with pytest.raises(errors.MalformedSpec, match=r"'r-0' .* admission has not resolved"):
        engine.start({WIRE_KEY: SPEC.dumps()})


@pytest.mark.parametrize(
    "broken",
    [
        {"prompt": None},
        {"prompt": [(0, 5, 2.0, 0.0)]},
        {"prompt": [(0, -1, 2.0, 0.0)]},
        {"prompt": [(9, 0, 2.0, 0.0)]},
        {"windows": [(0, [(0, 0, 2.0)], "")]},
        {"windows": [(0, b"0" * 27, "")]},
        {"windows": [(0, pack([Entry(9, 0, 2.0, 0.0)]), "")]},
        {"windows": [(0, pack([Entry(-1, 0, 2.0, 0.0)]), "")]},
        {"windows": [(0, pack([Entry(0, 1, 2.0, 0.0)]), "")]},
        {"windows": [(0, pack([Entry(0, 0, 2.0, 0.0)] * 9), "")]},
        {"contents": []},
        {"contents": [(0, "another vector")]},
        {"readout": {"layers": [LAYER]}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_record_that_is_not_what_admission_writes_stops_the_engine(engine: Engine, broken: dict[str, Any]) -> None:
    extra = engine.extra()
    extra[RESOLVED_KEY] |= broken
    with pytest.raises((TypeError, KeyError, IndexError, ValueError)):  # vLLM stops on any of them
        engine.start(extra)


@pytest.mark.parametrize("field", ["windows", "prompt_len", "readout", "contents"])
def test_a_record_without_a_field_stops_the_engine(engine: Engine, field: str) -> None:
    extra = engine.extra()
    del extra[RESOLVED_KEY][field]
    with pytest.raises((TypeError, KeyError)):
        engine.start(extra)


def test_a_direction_that_was_booked_and_never_written_stops_the_engine(engine: Engine) -> None:
    engine.admission.registry.register([OTHER])  # type: ignore[attr-defined]
    with pytest.raises(errors.DirectionError, match="not in slot 1 of the worker's bank"):
        engine.start(engine.extra())


def test_a_direction_file_that_changed_after_the_workers_read_it_stops_the_engine(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    save_directions(file, [OTHER])
    settings = SteerSettings(layers=(LAYER,), directions=(str(file),))
    engine = Engine()
    engine.runner = StandInRunner(settings)
    engine.runner.load_model()
    save_directions(file, [KIND_DIRECTION])
    engine.admission = Admission(settings, SIZE)
    with pytest.raises(errors.DirectionError, match="direction file has changed"):
        engine.start(engine.extra())


def test_a_model_that_was_put_in_the_place_of_the_hooked_one_stops_the_engine(engine: Engine) -> None:
    engine.start(engine.extra())
    engine.runner.model = StandInModel()
    with pytest.raises(errors.UnsupportedFeature, match="replaced after the hooks"):
        engine.runner.prepare([("r-0", PROMPT_LEN, 1)])


def test_a_model_that_was_loaded_again_has_lost_what_was_registered(engine: Engine) -> None:
    engine.runner.load_model()
    with pytest.raises(errors.DirectionError, match="not in slot 0"):
        engine.start(engine.extra())


def test_layers_of_another_class_are_not_hooked_by_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaDecoderLayer, "__module__", "another.implementation")
    with pytest.raises(errors.UnsupportedModel, match=r"another\.implementation"):
        StandInRunner(SETTINGS).load_model()


def test_a_layer_that_the_loaded_model_lacks_is_refused() -> None:
    with pytest.raises(errors.LayerNotHooked, match="layer 5"):
        StandInRunner(SteerSettings(layers=(BLOCKS,))).load_model()


def test_a_runner_that_puts_no_hooks_on_its_model_is_refused_at_start() -> None:
    worker = StandInWorker(StandInRunner(SETTINGS))
    with pytest.raises(errors.UnsupportedFeature, match="StandInRunner has loaded its model and put no hooks"):
        rpc._checked(lambda: None, worker)()
    rpc._checked(worker.model_runner.load_model, worker)()


@pytest.mark.parametrize(("call", "arguments"), [(rpc.write, ([], b"")), (rpc.collect, ([],)), (rpc.traces, ([],))])
def test_a_worker_without_steering_answers_no_call(call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(errors.NotConfigured, match="no hooks"):
        call(StandInWorker(StandInRunner(None)), *arguments)


def test_a_step_that_is_prepared_twice_fails_the_readout(engine: Engine) -> None:
    engine.start(engine.extra(), tokens=2)
    for _ in range(2):
        engine.runner.prepare([("r-0", 2, 1)])
    assert "token 2 where token 3 was due" in engine.answer(3)["error"]


def test_a_step_that_is_not_prepared_fails_the_readout(engine: Engine) -> None:
    engine.start(engine.extra())
    engine.runner.prepare([("r-0", PROMPT_LEN + 1, 1)])
    assert "were not seen" in engine.answer(PROMPT_LEN + 2)["error"]


def test_more_requests_or_tokens_than_there_is_room_for_stop_the_engine(engine: Engine) -> None:
    extra = engine.extra() | {RESOLVED_KEY: engine.extra()[RESOLVED_KEY] | {"readout": None}}
    new = [
        SimpleNamespace(req_id=f"r-{i}", sampling_params=SimpleNamespace(extra_args=extra, stop=[])) for i in range(25)
    ]
    with pytest.raises(IndexError):
        engine.runner.prepare([(one.req_id, 0, 1) for one in new], new=new)
    with pytest.raises(ValueError, match="29"):
        engine.start(engine.extra(), tokens=29)


def test_a_device_that_the_op_is_not_written_for_is_an_error(engine: Engine) -> None:
    point = engine.runner.model.layers[LAYER].vllm_steer
    with pytest.raises(NotImplementedError, match="steer_and_read"):
        point(torch.zeros(1, SIZE).to_sparse(), None)


def test_the_prefix_cache_takes_no_record_for_granted() -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={RESOLVED_KEY: {}}))
    with pytest.raises(KeyError):
        prefix_cache.fork_key(request, 0, 16)
