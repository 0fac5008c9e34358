"""``AsyncLLM``: the wrapper of ``generate``, and the asynchronous forms of the functions that scripts call."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer import (
    Direction,
    Readout,
    Steering,
    abandon_requests,
    abandon_requests_async,
    collect_readouts,
    collect_readouts_async,
    errors,
    register_directions,
    register_directions_async,
    steered,
)
from vllm_steer.engine import vllm_versions
from vllm_steer.engine.background import run_in_background
from vllm_steer.engine.early_ends import CUT_OFF_REASON
from vllm_steer.engine.front import async_generate, offline, request_intake
from vllm_steer.engine.front.admission import Admission, Asked, admission_of
from vllm_steer.engine.front.async_generate import _generated
from vllm_steer.engine.front.http_exchange import Exchange
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.server import batch_runner
from vllm_steer.settings import CONFIG_KEY, SteerSettings

SIZE, LAYER = 8, 1
KIND = Direction("kind", LAYER, np.arange(1, SIZE + 1)).normalised()
READ = steered(SamplingParams(), readout=Readout([LAYER]))


@pytest.fixture(autouse=True)
def _loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_versions, "_loaded", True)


@dataclass
class StandInEngine:
    """The parts of an ``AsyncLLM`` that the plugin uses, with the real admission."""

    input_processor: Any
    unfinished: list[str] = field(default_factory=list)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    failure: Exception | None = None
    answers: Any = None

    @property
    def output_processor(self) -> Any:
        return SimpleNamespace(
            request_states=dict.fromkeys(self.unfinished), has_unfinished_requests=lambda: bool(self.unfinished)
        )

    engine_core = None

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        self.asked.append((method, args))
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        return self.answers

    async def abort(self, request_ids: list[str], internal: bool = False) -> None:
        assert internal
        self.unfinished = [one for one in self.unfinished if one not in request_ids]


def engine(**settings: Any) -> StandInEngine:
    of_engine = SteerSettings(layers=(LAYER,), max_directions=2, **settings)
    processor = object.__new__(InputProcessor)
    stages = SimpleNamespace(pipeline_parallel_size=1)
    config = {CONFIG_KEY: of_engine.as_config()}
    processor.vllm_config = SimpleNamespace(additional_config=config, parallel_config=stages)
    processor.model_config = SimpleNamespace(get_hidden_size=lambda: SIZE, dtype="float32")
    return StandInEngine(processor)


def output(request_id: str = "r", reason: str | None = None, stop: str | None = None) -> RequestOutput:
    part = CompletionOutput(0, "", [1, 2], None, None, finish_reason=reason, stop_reason=stop)
    return RequestOutput(request_id, None, [1, 2, 3], None, [part], finished=reason is not None)


async def outputs_of(*told: RequestOutput) -> AsyncIterator[RequestOutput]:
    for one in told:
        await asyncio.sleep(0)
        yield one


async def ask(
    of_engine: StandInEngine, params: SamplingParams, *told: RequestOutput, exchange: Exchange | None = None
) -> list[SamplingParams]:
    """Run a request; return the parameters that vLLM gets."""
    seen: list[SamplingParams] = []

    def run(own: SamplingParams) -> AsyncIterator[RequestOutput]:
        seen.append(own)
        return outputs_of(*told)

    async for _ in _generated(of_engine, run, params, "r", exchange):
        pass
    return seen


def test_an_exchange_gives_its_spec_to_each_engine_request_and_leaves_the_parameters_alone() -> None:
    params, exchange = SamplingParams(extra_args={"own": 1}), Exchange(spec=RequestSpec((Steering("kind", 1.0),)))
    first, second = (asyncio.run(ask(engine(), params, output(), exchange=exchange))[0] for _ in range(2))
    assert params.extra_args == {"own": 1}
    for own in (first, second):
        assert own.extra_args is not None
        assert own.extra_args["own"] == 1
        assert own.extra_args[WIRE_KEY].spec == exchange.spec
    assert first.extra_args is not None
    assert second.extra_args is not None
    assert first.extra_args[WIRE_KEY].key != second.extra_args[WIRE_KEY].key


def test_an_exchange_that_asks_for_no_steering_keeps_the_engines_default_away() -> None:
    default = {"default_steering": (Steering("kind", 2.0),)}
    (own,) = asyncio.run(ask(engine(**default), SamplingParams(), output(), exchange=Exchange(spec=RequestSpec(()))))
    assert own.extra_args is not None
    assert own.extra_args[WIRE_KEY].spec == RequestSpec(())
    assert request_intake.asked_of(engine(**default).input_processor, own.extra_args) is None
    (own,) = asyncio.run(ask(engine(**default), SamplingParams(), output(), exchange=Exchange()))
    assert own.extra_args is not None
    assert own.extra_args[WIRE_KEY].spec.entries == default["default_steering"]


def test_an_exchange_learns_that_it_was_applied_when_a_request_of_it_is_admitted() -> None:
    exchange = Exchange(spec=RequestSpec((Steering("kind", 1.0),)))
    (own,) = asyncio.run(ask(engine(), SamplingParams(), output(), exchange=exchange))
    assert not exchange.is_applied
    assert own.extra_args is not None
    own.extra_args[WIRE_KEY].admitted()
    assert exchange.is_applied


def test_an_overflow_is_an_error_of_the_plugins_own() -> None:
    exchange = Exchange(spec=RequestSpec((Steering("kind", 1.0),)))
    with pytest.raises(errors.StreamOverflow, match=r"^steering pushed the residual stream beyond") as refused:
        asyncio.run(ask(engine(), SamplingParams(), output(reason="error", stop=CUT_OFF_REASON), exchange=exchange))
    assert exchange.refusal is refused.value
    assert refused.value.http_status == 400  # type: ignore[attr-defined]  # it is vLLM's error too
    asyncio.run(
        ask(engine(), SamplingParams(), output(reason="error"), exchange=exchange)
    )  # vLLM's own error, which vLLM reports


def test_a_readout_that_ray_s_stage_would_lose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, async_generate._RAY_STAGE, ModuleType("stage"))
    with pytest.raises(errors.MalformedSpec, match="Ray Data's LLM stage"):
        asyncio.run(ask(engine(), READ, output()))
    asyncio.run(ask(engine(), steered(SamplingParams(), [Steering("kind", 1.0)]), output()))


def test_two_readouts_under_one_id_at_once_are_refused() -> None:
    async def both(of_engine: StandInEngine) -> list[Any]:
        return await asyncio.gather(
            ask(of_engine, READ, output()), ask(of_engine, READ, output()), return_exceptions=True
        )

    of_engine = engine()
    first, second = asyncio.run(both(of_engine))
    assert isinstance(second, errors.MalformedSpec)
    assert not isinstance(first, BaseException)
    asyncio.run(ask(of_engine, READ, output()))  # one after the other, the same id is allowed


def test_a_request_s_readout_is_collected_by_its_own_key() -> None:
    of_engine = engine()
    admission_of(of_engine.input_processor).remember("r", Asked(RequestSpec(None, Readout([LAYER])), key="unique"))
    mean = np.arange(SIZE, dtype=np.float32)
    answer = {
        "num_tokens": 4,
        "layers": [LAYER],
        "pooled": mean.tobytes(),
        "max": [],
        "stopped": [],
        "flags": [],
        "projections": [],
        "trace": [],
        "rows": [],
        "trace_error": None,
        "proof": "parity",
    }
    of_engine.answers = [[answer]]
    ((read,), (none,)) = asyncio.run(collect_readouts_async(of_engine, [output("r"), output("other")]))  # type: ignore[arg-type]
    assert of_engine.asked == [("vllm_steer_collect", ([("unique", 0, 3 + 2 - 1)],))]
    assert none is None
    assert read is not None
    np.testing.assert_array_equal(read.mean[LAYER], mean)


def test_a_request_that_ended_with_an_error_has_no_readout_and_the_others_have() -> None:
    of_engine = engine()
    for name in ("r", "s"):
        admission_of(of_engine.input_processor).remember(name, Asked(RequestSpec(None, Readout([LAYER])), key=name))
    of_engine.answers = [
        [
            {
                "num_tokens": 4,
                "layers": [],
                "pooled": None,
                "max": [],
                "stopped": [],
                "flags": [],
                "projections": [],
                "trace": [],
                "rows": [],
                "trace_error": None,
                "proof": "parity",
            }
        ]
    ]
    told = [output("r", "error", CUT_OFF_REASON), output("s", "length")]
    with pytest.raises(errors.ReadoutUnavailable, match=r"1 of 2 readouts .* beyond") as failed:
        asyncio.run(collect_readouts_async(of_engine, told))  # type: ignore[arg-type]
    assert failed.value.results[0] == [None]
    assert failed.value.results[1][0].num_tokens == 4


def test_directions_are_found_only_once_the_workers_have_them() -> None:
    async def seen_meanwhile(of_engine: StandInEngine) -> bool:
        registration = asyncio.create_task(register_directions_async(of_engine, [KIND]))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        known = bool(list(admission_of(of_engine.input_processor).registry.all()))
        await registration
        return known

    of_engine = engine()
    assert not asyncio.run(seen_meanwhile(of_engine))
    assert of_engine.asked[0][0] == "vllm_steer_write"
    assert [one.name for one in admission_of(of_engine.input_processor).registry.all()] == ["kind"]


def test_slots_are_given_back_where_the_workers_could_not_be_written() -> None:
    of_engine = engine()
    of_engine.failure = OSError("gone")
    for _ in range(5):  # more than there are slots
        with pytest.raises(OSError, match="gone"):
            asyncio.run(register_directions_async(of_engine, [KIND]))  # type: ignore[arg-type]
    assert not list(admission_of(of_engine.input_processor).registry.all())


def test_offline_too_slots_are_given_back_where_the_workers_could_not_be_written(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = engine().input_processor
    sent: list[tuple[str, Any]] = []
    failure: Exception | None = OSError("gone")

    def collective_rpc(method: str, args: tuple[Any, ...]) -> None:
        sent.append((method, args))
        assert not list(admission_of(processor).registry.all()), "found before the workers have it"
        if failure is not None:
            raise failure

    core = SimpleNamespace(input_processor=processor, has_unfinished_requests=lambda: False)
    llm: Any = SimpleNamespace(llm_engine=core, collective_rpc=collective_rpc)
    for _ in range(5):  # more than there are slots
        with pytest.raises(OSError, match="gone"):
            register_directions(llm, [KIND])
    assert not list(admission_of(processor).registry.all())
    failure = None
    monkeypatch.setattr(offline, "MANY", 1)
    logger = logging.getLogger("vllm.vllm_steer")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with caplog.at_level(logging.INFO, logger.name):
        register_directions(llm, [KIND])
        register_directions(llm, [KIND])  # known already: nothing is sent or told
    assert [one.name for one in admission_of(processor).registry.all()] == ["kind"]
    assert sent[5:] == [("vllm_steer_write", ([0], KIND.vector.tobytes()))]
    # Once or, where vLLM's loggers pass their records on, twice.
    assert {message.split(":")[0] for message in caplog.messages} == {"registering 1 directions of 8 numbers"}


def test_a_replaced_direction_s_slot_is_used_again_only_while_nothing_runs() -> None:
    of_engine = engine()
    of_engine.unfinished = ["running"]
    longer = Direction("kind", LAYER, 2 * KIND.vector)
    asyncio.run(register_directions_async(of_engine, [KIND]))  # type: ignore[arg-type]
    asyncio.run(register_directions_async(of_engine, [longer]))  # type: ignore[arg-type]
    with pytest.raises(errors.BankFull):
        asyncio.run(register_directions_async(of_engine, [KIND]))  # type: ignore[arg-type]
    of_engine.unfinished = []
    asyncio.run(register_directions_async(of_engine, [KIND]))  # type: ignore[arg-type]


def test_unfinished_requests_are_abandoned() -> None:
    of_engine = engine()
    of_engine.unfinished = ["a", "b"]
    assert asyncio.run(abandon_requests_async(of_engine)) == 2  # type: ignore[arg-type]
    assert asyncio.run(abandon_requests_async(of_engine)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "args"), [(collect_readouts, ([],)), (register_directions, ([KIND],)), (abandon_requests, ())]
)
def test_an_asynchronous_engine_is_told_the_form_for_it(function: Any, args: tuple[Any, ...]) -> None:
    asynchronous = object.__new__(AsyncLLM)
    asynchronous.shutdown = lambda *_: None  # else its end would look for an engine
    with pytest.raises(errors.MalformedSpec, match=f"Await {function.__name__}_async"):
        function(asynchronous, *args)


def test_a_servers_registry_is_not_changed_behind_its_back() -> None:
    of_engine = engine()
    admission: Admission = admission_of(of_engine.input_processor)
    assert isinstance(admission.registry, DirectionRegistry)
    admission.registry = DirectionBook()
    with pytest.raises(errors.ChangeNotAllowed, match="PUT /v1/steering/directions"):
        asyncio.run(register_directions_async(of_engine, [KIND]))  # type: ignore[arg-type]


def test_a_line_that_was_answered_unsteered_is_an_error() -> None:
    reply = ChatCompletionResponse(model="m", choices=[], usage=UsageInfo())
    exchange = Exchange(whole=RequestSpec((Steering("kind", 1.0),)))
    with pytest.raises(errors.NotOnThisRoute, match="answered without being steered"):
        batch_runner._completed(reply, exchange)
    exchange.is_applied = True
    assert batch_runner._completed(reply, exchange) is reply


def test_a_task_that_nobody_awaits_says_in_the_log_why_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise OSError("the reason")

    async def run() -> None:
        task = run_in_background(fails(), "The work")
        cancelled = run_in_background(asyncio.sleep(10), "The other")
        await asyncio.wait([task])
        cancelled.cancel()

    logger = logging.getLogger("vllm.vllm_steer")
    logger.addHandler(caplog.handler)
    try:
        asyncio.run(run())
    finally:
        logger.removeHandler(caplog.handler)
    # Once or, where vLLM's loggers pass their records on, twice.
    assert {record.message for record in caplog.records} == {"The work has ended: the reason"}
