"""Which vLLM releases the plugin steers, of which it says that not all tests run on them, and which it refuses."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_steer import Readout, Steering, collect_readouts, plugin, steer_config, steered
from vllm_steer.engine import early_ends, prefix_cache, startup_checks, vllm_versions
from vllm_steer.engine.front import request_intake
from vllm_steer.engine.vllm_faults import death_watch
from vllm_steer.engine.worker import rpc
from vllm_steer.errors import UnsupportedFeature
from vllm_steer.server.endpoints import SteerEndpoints

MODULES = (startup_checks, request_intake, prefix_cache, rpc, death_watch, early_ends)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The modules whose patches `register` would install; recorded, not installed."""
    noted: set[str] = set()
    for module in MODULES:
        monkeypatch.setattr(module, "install", lambda name=module.__name__: noted.add(name))
    monkeypatch.setattr(vllm_versions, "_loaded", False)
    yield noted
    vllm_versions.unsupported_reason.cache_clear()  # it has cached answers for versions that a test made up


def register_beside(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_versions, "vllm_version", lambda: version)
    vllm_versions.unsupported_reason.cache_clear()
    plugin.register()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1"])
def test_a_release_that_the_tests_run_on_is_patched_without_a_word(
    version: str, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_beside(version, monkeypatch)
    assert installed == {module.__name__ for module in MODULES}
    assert vllm_versions.remark(version) is None


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.33.0", "0.33's Python on 0.32's CPU operations"),
        ("0.33.1.dev3+cpu", "0.33's Python on 0.32's CPU operations"),
    ],
)
def test_a_release_that_not_all_tests_run_on_is_patched_and_remarked_on(
    version: str, said: str, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_beside(version, monkeypatch)
    assert installed == {module.__name__ for module in MODULES}
    remark = vllm_versions.remark(version)
    assert remark is not None
    assert said in remark
    assert version in remark


@pytest.mark.parametrize("version", ["0.24.0", "0.3.3", "0.31.0", "0.34.0", "1.32.0"])
def test_any_other_release_is_refused(version: str, installed: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    register_beside(version, monkeypatch)
    assert installed == {startup_checks.__name__}
    reason = vllm_versions.unsupported_reason()
    assert reason is not None
    assert version in reason
    for asked in ({"steering": [Steering("kind", 1.0)]}, {"readout": Readout([1])}):
        with pytest.raises(UnsupportedFeature, match=re.escape(reason)):
            steered(SamplingParams(), **asked)
    with pytest.raises(UnsupportedFeature):
        collect_readouts(None, [])  # type: ignore[arg-type]
    assert steered(SamplingParams()).extra_args is None


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_an_environment_variable_switches_the_plugin_off(
    value: str, is_off: bool, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STEER_DISABLE", value)
    register_beside("0.32.0", monkeypatch)
    app = FastAPI()
    without = len(app.routes)
    SteerEndpoints().attach_router(app)
    if not is_off:
        assert installed == {module.__name__ for module in MODULES}
        assert len(app.routes) > without
        assert app.user_middleware
        return
    assert installed == {startup_checks.__name__}  # which refuses engines that ask for steering
    assert (len(app.routes), app.user_middleware) == (without, [])
    with pytest.raises(UnsupportedFeature, match="VLLM_STEER_DISABLE switches"):
        steered(SamplingParams(), [Steering("kind", 1.0)])
    assert steered(SamplingParams()).extra_args is None
    monkeypatch.undo()
    monkeypatch.setenv("VLLM_STEER_DISABLE", value)
    made = SimpleNamespace(additional_config=steer_config([1]), use_v2_model_runner=False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: made)
    startup_checks.install()
    with pytest.raises(UnsupportedFeature, match="VLLM_STEER_DISABLE switches"):
        EngineArgs.create_engine_config(None)
    made.additional_config = {}
    assert EngineArgs.create_engine_config(None) is made


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0"])
def test_a_request_made_before_vllm_has_loaded_the_plugin_is_refused_beside_another_release_too(
    version: str, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_versions, "vllm_version", lambda: version)
    vllm_versions.unsupported_reason.cache_clear()
    if version == "0.32.0":
        assert steered(SamplingParams(), [Steering("kind", 1.0)]).extra_args
    else:
        with pytest.raises(UnsupportedFeature, match=version):
            steered(SamplingParams(), [Steering("kind", 1.0)])
    assert not installed


def test_only_an_engine_that_is_configured_hears_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = SimpleNamespace(
        additional_config={}, use_v2_model_runner=False, model_config=SimpleNamespace(get_hidden_size=lambda: 8)
    )
    monkeypatch.setattr(startup_checks, "check", lambda *_: None)
    monkeypatch.setattr(startup_checks.logger, "propagate", True)
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: made)
    startup_checks.install()
    monkeypatch.setattr(vllm_versions, "remark", lambda _: "run in part, says this test")
    with caplog.at_level(logging.WARNING):
        EngineArgs.create_engine_config(None)
        assert "run in part" not in caplog.text
        made.additional_config = steer_config([1])
        EngineArgs.create_engine_config(None)
        assert "run in part, says this test" in caplog.text
    monkeypatch.setattr(vllm_versions, "unsupported_reason", lambda: "beside another vLLM")
    with pytest.raises(UnsupportedFeature, match="beside another vLLM"):
        EngineArgs.create_engine_config(None)
    made.additional_config = {}
    assert EngineArgs.create_engine_config(None) is made


def test_a_function_that_vllm_lacks_is_an_error_and_not_added_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EngineArgs, "create_engine_config")
    with pytest.raises(AttributeError, match="create_engine_config"):
        startup_checks.install()


def test_what_is_installed_twice_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineArgs, "create_engine_config", plain := lambda self: None)
    startup_checks.install()
    once = EngineArgs.create_engine_config
    startup_checks.install()
    assert EngineArgs.create_engine_config is once
    assert once.__wrapped__ is plain
