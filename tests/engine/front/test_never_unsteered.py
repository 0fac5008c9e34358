"""Without hooks, checks or the plugin itself, nothing runs silently unsteered: the front end refuses or warns."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.input_processor import InputProcessor

from tests.support.server.stub_openai_app import StubChecker
from vllm_steer import Direction, Readout, Steering, errors, steered
from vllm_steer.engine import startup_checks, vllm_versions
from vllm_steer.engine.front import request_intake
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.http_exchange import Exchange, current_exchange
from vllm_steer.engine.front.offline import collect_readouts, register_directions
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.server.inbound.model_names import ModelNames
from vllm_steer.server.middleware import SERVED, Served, SteerMiddleware
from vllm_steer.settings import CONFIG_KEY, SteerSettings

SIZE, LAYER, PROMPT_LEN = 8, 1, 3
SETTINGS = SteerSettings(layers=(LAYER,))
SPEC = RequestSpec((Steering("kind", 2.0),))
KIND_DIRECTION = Direction("kind", LAYER, np.arange(1, SIZE + 1)).normalised()


class TestFrontEnd:
    @pytest.fixture
    def processor(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[SteerSettings | None], InputProcessor]:
        """vLLM's class with the plugin's wrappers around methods that do nothing."""

        def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, **kwargs: Any) -> Any:
            embeds = prompt if prompt == "embeddings" else None
            return SimpleNamespace(
                request_id=request_id,
                prompt_token_ids=[1] * PROMPT_LEN,
                prompt_embeds=embeds,
                cache_salt=None,
                sampling_params=params.clone(),
            )

        monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
        monkeypatch.setattr(InputProcessor, "assign_request_id", staticmethod(lambda request: None))
        request_intake.install()

        def made(settings: SteerSettings | None) -> InputProcessor:
            processor = object.__new__(InputProcessor)
            of_engine = {} if settings is None else {CONFIG_KEY: settings.as_config()}
            stages = SimpleNamespace(pipeline_parallel_size=1)
            processor.vllm_config = SimpleNamespace(additional_config=of_engine, parallel_config=stages)
            processor.model_config = SimpleNamespace(get_hidden_size=lambda: SIZE, dtype="float32")
            if settings is not None:
                request_intake.admission_of(processor).registry.register([KIND_DIRECTION])  # type: ignore[attr-defined]
            return processor

        return made

    def test_an_engine_without_hooks_takes_neither_a_spec_nor_a_request_that_another_admitted(
        self, processor: Callable[[SteerSettings | None], InputProcessor]
    ) -> None:
        params = SamplingParams(extra_args={WIRE_KEY: SPEC.dumps()})
        with pytest.raises(errors.NotConfigured) as refused:
            processor(None).process_inputs("r", [1], params)
        assert refused.value.http_status == 400  # type: ignore[attr-defined]  # it is vLLM's error too
        admitted = processor(SETTINGS).process_inputs("r", [1], params)
        assert RESOLVED_KEY in admitted.sampling_params.extra_args
        processor(SETTINGS).assign_request_id(admitted)
        with pytest.raises(errors.NotConfigured):
            processor(None).assign_request_id(admitted)

    def test_a_request_made_by_hand_with_a_spec_is_refused(
        self, processor: Callable[[SteerSettings | None], InputProcessor]
    ) -> None:
        by_hand = SimpleNamespace(sampling_params=SamplingParams(extra_args={WIRE_KEY: SPEC.dumps()}))
        for settings in (SETTINGS, None):
            with pytest.raises(errors.MalformedSpec, match="made by hand"):
                processor(settings).assign_request_id(by_hand)

    @pytest.mark.parametrize(
        ("extra", "prompt", "options", "refusal"),
        [
            ({RESOLVED_KEY: {}}, [1], {}, errors.UnknownField),
            ({WIRE_KEY: SPEC.dumps()}, [1], {"resumable": True}, errors.MalformedSpec),
            ({WIRE_KEY: SPEC.dumps()}, "embeddings", {}, errors.MalformedSpec),
            ({WIRE_KEY: RequestSpec((Steering("kidn", 1.0),)).dumps()}, [1], {}, errors.UnknownDirection),
        ],
        ids=["resolved by the caller", "streaming input", "embeddings", "unknown name"],
    )
    def test_what_would_run_unsteered_or_unchecked_is_refused(
        self,
        processor: Callable[[SteerSettings | None], InputProcessor],
        extra: dict[str, Any],
        prompt: Any,
        options: dict[str, Any],
        refusal: type[errors.SteerError],
    ) -> None:
        with pytest.raises(refusal):
            processor(SETTINGS).process_inputs("r", prompt, SamplingParams(extra_args=extra), **options)

    def test_the_spec_that_counts_is_the_text_in_extra_args_whatever_was_attached(
        self, processor: Callable[[SteerSettings | None], InputProcessor]
    ) -> None:
        def resolved(params: SamplingParams) -> list[Any]:
            extra = processor(SETTINGS).process_inputs("r", [1], params).sampling_params.extra_args
            assert WIRE_KEY not in extra
            windows: list[Any] = extra[RESOLVED_KEY]["windows"]
            return windows

        attached, other = steered({}, SPEC.steering), steered({}, [Steering("kind", 3.0)])
        assert attached.extra_args == {WIRE_KEY: SPEC.dumps()}
        for same in (copy(attached), deepcopy(attached), pickle.loads(pickle.dumps(attached))):
            assert same == attached
            assert resolved(same) == resolved(attached)
        attached.extra_args = other.extra_args
        assert resolved(attached) == resolved(other)
        attached.extra_args = None
        untouched = processor(SETTINGS).process_inputs("r", [1], attached)
        assert untouched.sampling_params.extra_args is None

    def test_the_callers_guard_rails_reach_the_requests_of_a_websocket(self) -> None:
        seen: list[Exchange | None] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(current_exchange.get())

        checker = StubChecker(allowed_directions={"key:2bb80d537b1d": ["calm"]})
        state = SimpleNamespace(**{SERVED.name: Served(checker, lambda: ModelNames("base"))})
        headers = [(b"authorization", b"Bearer secret")]
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": headers, "app": SimpleNamespace(state=state)}
        asyncio.run(SteerMiddleware(app)(scope, None, None))  # type: ignore[arg-type]
        assert seen[0] is not None
        assert seen[0].allowed == {"calm"}


class TestPluginThatIsNotLoaded:
    @pytest.fixture(autouse=True)
    def _not_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm_versions, "_loaded", False)

    @pytest.mark.parametrize("chosen", ["", "another", "another,vllm_steers"])
    def test_a_spec_is_not_attached_where_the_plugin_is_filtered_out(
        self, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
        with pytest.raises(errors.NotConfigured, match="VLLM_PLUGINS is"):
            steered(SamplingParams(), [Steering("kind", 1.0)])
        assert steered(SamplingParams()).extra_args is None  # it asks for nothing

    def test_a_spec_is_not_attached_where_the_package_only_lies_on_the_path(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_versions, "_is_installed", lambda: False)
        with pytest.raises(errors.NotConfigured, match="vllm-steer is not installed"):
            steered(SamplingParams(), readout=Readout([1]))

    def test_a_spec_can_be_made_before_the_engine(self) -> None:
        assert WIRE_KEY in steered(SamplingParams(), [Steering("kind", 1.0)]).extra_args

    def test_an_engine_that_has_started_without_it_registers_and_collects_nothing(self) -> None:
        with pytest.raises(errors.NotConfigured):
            collect_readouts(SimpleNamespace(), [])
        with pytest.raises(errors.NotConfigured):
            register_directions(SimpleNamespace(), [KIND_DIRECTION])


@pytest.mark.parametrize(("chosen", "starts"), [(None, False), ("another", False), ("another,vllm_steer", True)])
def test_a_server_whose_endpoints_would_not_load_is_refused(
    chosen: str | None, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SimpleNamespace(additional_config={CONFIG_KEY: SETTINGS.as_config()}, use_v2_model_runner=False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, usage_context=None: made)
    monkeypatch.setattr(startup_checks, "check", lambda *args: None)
    made.model_config = SimpleNamespace(get_hidden_size=lambda: SIZE)
    startup_checks.install()
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    create: Any = EngineArgs.create_engine_config
    assert create(None, UsageContext.LLM_CLASS) is made
    if starts:
        assert create(None, usage_context=UsageContext.OPENAI_API_SERVER) is made
    else:
        with pytest.raises(errors.SettingsError, match="VLLM_PLUGINS"):
            create(None, usage_context=UsageContext.OPENAI_API_SERVER)


def test_a_bound_in_residual_norms_is_kept() -> None:
    admission = Admission(
        SteerSettings(layers=(LAYER,), max_alpha_residual_norm=0.5, residual_norms={LAYER: 8.0}), hidden_size=SIZE
    )
    admission.registry.register([KIND_DIRECTION])  # type: ignore[attr-defined]
    admission.check(RequestSpec((Steering("kind", -4.0),)))
    with pytest.raises(errors.BadAlpha, match=r"0\.512 times the mean residual norm there, 8; allowed: up to 0\.5"):
        admission.check(RequestSpec((Steering("kind", 4.1),)))


def test_a_machine_without_vllm_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(vllm_versions, "version", absent)
    with pytest.raises(errors.UnsupportedFeature, match="install vllm-steer"):
        vllm_versions.vllm_version()
