"""Ways to speculate that were not compared, or cannot be exact, are refused by name before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm import EngineArgs
from vllm.config.speculative import MTPModelTypes, SpeculativeConfig, SpeculativeMethod

from vllm_steer import steer_config
from vllm_steer.engine.startup_checks import check
from vllm_steer.errors import UnsupportedFeature
from vllm_steer.settings import SteerSettings

pytestmark = pytest.mark.engine

LAYERS = (1,)
COMPARED = ["ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp", "medusa"]
REFUSED = {
    "ngram_gpu": "never compared",
    "mlp_speculator": "classic runner has no such method",
    "dflash": "never compared",
    "dspark": "only vLLM's V2 model runner",
    "custom_class": "never compared",
    "extract_hidden_states": "hands hidden states to a KV connector",
}


@pytest.fixture
def config(checkpoint: Path) -> Any:
    """vLLM's config of an engine without speculation, to be changed by a test."""
    return EngineArgs(str(checkpoint), additional_config=steer_config(layers=[*LAYERS])).create_engine_config()


def speculating(config: Any, method: str, **fields: Any) -> Any:
    config.speculative_config = SimpleNamespace(method=method, rejection_sample_method="standard", **fields)
    return config


def refusal(config: Any) -> str:
    with pytest.raises(UnsupportedFeature) as refused:
        check(config, SteerSettings(layers=LAYERS))
    return str(refused.value)


def test_every_method_of_vllm_is_either_compared_or_refused() -> None:
    older_names_of_mtp = {*get_args(MTPModelTypes)} - {"mtp"}
    # other releases lack some of them: 0.33 has neither Medusa nor mlp_speculator
    assert {*get_args(SpeculativeMethod)} - older_names_of_mtp <= {*COMPARED, *REFUSED}


@pytest.mark.parametrize("method", COMPARED)
def test_what_was_compared_is_allowed(config: Any, method: str) -> None:
    check(speculating(config, method), SteerSettings(layers=LAYERS))


@pytest.mark.conformance("speculative decoding (other methods)", family="llama", refused=True)
@pytest.mark.parametrize(("method", "reason"), REFUSED.items())
def test_other_methods_are_refused_by_name(config: Any, method: str, reason: str) -> None:
    told = refusal(speculating(config, method))
    assert f"speculative decoding by '{method}'" in told
    assert reason in told
    assert all(f"'{allowed}'" in told for allowed in COMPARED)


@pytest.mark.conformance("speculative decoding, asynchronously scheduled", family="llama", refused=True)
@pytest.mark.parametrize("method", COMPARED)
def test_asynchronous_scheduling_is_refused_beside_drafts(config: Any, method: str) -> None:
    config.scheduler_config.async_scheduling = True  # the CPU platform switches it off, even if it was asked for
    told = refusal(speculating(config, method))
    assert "speculative decoding and asynchronous scheduling at once" in told
    assert "Set async_scheduling=False" in told


@pytest.mark.conformance("speculative decoding on the V2 model runner", family="llama", refused=True)
@pytest.mark.parametrize("method", COMPARED)
def test_the_v2_runner_is_refused_beside_drafts(config: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    told = refusal(speculating(config, method))
    assert "speculative decoding on vLLM's V2 model runner" in told
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in told


def test_drafts_that_are_accepted_by_chance_are_refused(config: Any) -> None:
    speculating(config, "eagle").speculative_config.rejection_sample_method = "synthetic"
    assert "rejection_sample_method='synthetic'" in refusal(config)


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3", "mtp", "medusa"])
def test_lora_is_refused_beside_drafts_by_a_model(config: Any, method: str) -> None:
    config.lora_config = SimpleNamespace()
    assert "LoRA and drafts by a model at once" in refusal(speculating(config, method))


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_lora_is_allowed_beside_drafts_by_no_model(config: Any, method: str) -> None:
    config.lora_config = SimpleNamespace()
    check(speculating(config, method), SteerSettings(layers=LAYERS))


def test_a_start_is_refused_as_a_whole(checkpoint: Path) -> None:
    speculation = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engine = EngineArgs(
        str(checkpoint), speculative_config=speculation, additional_config=steer_config(layers=[*LAYERS])
    )
    with pytest.raises(UnsupportedFeature, match="speculative decoding by 'ngram_gpu'"):
        engine.create_engine_config()


def test_vllm_has_the_fields_that_the_checks_read() -> None:
    assert {"method", "rejection_sample_method"} <= set(SpeculativeConfig.__dataclass_fields__)
