"""The doctor judges from the config alone as an engine's start would, and never disagrees with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs

from batch_jobs.cli.main import app
from tests.support.tiny_models import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    SUPPORTED_FAMILIES,
    VOCAB_SIZE,
    tiny_config,
)
from vllm_steer import Direction, SteerError, diagnose, save_directions, steer_config
from vllm_steer.errors import BadDirectionFile, SettingsError

ConfigFolder = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> ConfigFolder:
    """`folder(family)`: a folder with the config of a tiny model and nothing else, no weights and no tokenizer."""

    def write(family: str) -> Path:
        tiny_config(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return write


@pytest.fixture
def directions(tmp_path: Path) -> Callable[..., Path]:
    """`directions(2, 3)`: a file with a direction "kind" at each of these layers."""

    def write(*layers: int, size: int = HIDDEN_SIZE) -> Path:
        file = tmp_path / "kind.safetensors"
        save_directions(file, [Direction("kind", layer, np.ones(size)) for layer in layers])
        return file

    return write


def refusal_at_start(model: Path, **engine_args: Any) -> str | None:
    """The plugin's refusal in vLLM's first step of an engine's start, or None."""
    try:
        EngineArgs(str(model), **engine_args).create_engine_config()
    except SteerError as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_doctor_and_an_engines_start_agree(folder: ConfigFolder, family: str) -> None:
    model = folder(family)
    diagnosis = diagnose(model, layers=[1])
    assert refusal_at_start(model, additional_config=steer_config(layers=[1])) is None
    assert diagnosis.problems == ()
    assert diagnosis.proof == "parity"
    assert (diagnosis.num_layers, diagnosis.hidden_size) == (NUM_LAYERS, HIDDEN_SIZE)


def test_an_architecture_that_cannot_be_exact_is_refused_as_an_engines_start_would(tmp_path: Path) -> None:
    model = tiny_config_of("Gemma3nForCausalLM", tmp_path)
    diagnosis = diagnose(model, layers=[1])
    assert diagnosis.problems == (refusal_at_start(model, additional_config=steer_config(layers=[1])),)
    assert "several residual streams" in diagnosis.problems[0]
    assert (diagnosis.proof, diagnosis.layer_classes) == ("refused", ())


def test_a_diagnosis_names_classes_and_runner(folder: ConfigFolder) -> None:
    diagnosis = diagnose(folder("llama"))
    assert diagnosis.architecture == diagnosis.model_class == "LlamaForCausalLM"
    assert diagnosis.layer_classes == ("vllm.model_executor.models.llama.LlamaDecoderLayer",)
    assert diagnosis.layers == tuple(range(NUM_LAYERS))
    assert diagnosis.dtype == "bfloat16"  # vLLM's default for a float32 checkpoint
    assert diagnosis.runner == "classic"  # V2 needs Triton
    refused = dict(one.split(": ", 1) for one in (*diagnosis.refused_features, *diagnosis.refused_requests))
    assert refused["sleep mode"] == "a sleeping engine has freed the memory of its directions and readouts"
    assert {"a KV connector", "a pooling model", "beam search", "prompt embeddings"} <= set(refused)


def test_a_hybrid_has_a_class_for_each_kind_of_layer(tmp_path: Path) -> None:
    model = tiny_config_of("GraniteMoeHybridForCausalLM", tmp_path)
    assert [one.rpartition(".")[2] for one in diagnose(model, layers=[1]).layer_classes] == [
        "GraniteMoeHybridAttentionDecoderLayer",
        "GraniteMoeHybridMambaDecoderLayer",
    ]


def tiny_config_of(architecture: str, folder: Path) -> Path:
    """A folder with the config of a tiny model that tests/support/tiny_models.py does not have."""
    fields = {"hidden_size": HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "head_dim": 32}
    config_class = getattr(transformers, architecture).config_class
    config_class(**fields, vocab_size=VOCAB_SIZE, pad_token_id=2, architectures=[architecture]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "runs_as"),
    [("HeliumForCausalLM", "TransformersForCausalLM"), ("DogeForCausalLM", "TransformersMoEForCausalLM")],
)
def test_a_model_that_was_never_compared_is_unknown_until_a_copy_of_it_runs(
    tmp_path: Path, architecture: str, runs_as: str
) -> None:
    model = tiny_config_of(architecture, tmp_path)
    diagnosis = diagnose(model, layers=[1])
    (problem,) = diagnosis.problems
    assert f"{architecture}, which vLLM runs as {runs_as}, was never compared" in problem
    assert "doctor --run" in problem
    assert (diagnosis.proof, diagnosis.layer_classes) == ("unknown", ())


def test_another_implementation_than_the_compared_one_is_unknown(folder: ConfigFolder) -> None:
    diagnosis = diagnose(folder("llama"), layers=[1], model_impl="transformers")
    assert diagnosis.model_class == "TransformersForCausalLM"
    assert diagnosis.proof == "unknown"
    assert diagnose(folder("olmo2"), layers=[1], model_impl="transformers").proof == "parity"


@pytest.mark.slow
@pytest.mark.engine
class TestRun:
    """The experiment on a shrunken random copy, in a process of its own."""

    @pytest.mark.breadth
    def test_a_large_model_with_compared_layers_is_proven_by_parity(self, tmp_path: Path) -> None:
        transformers.Qwen3Config(
            num_hidden_layers=64, hidden_size=5120, architectures=["Qwen3ForCausalLM"]
        ).save_pretrained(tmp_path)
        diagnosis = diagnose(tmp_path, layers=[1], run=True)
        assert diagnosis.problems == ()
        assert (diagnosis.num_layers, diagnosis.proof) == (64, "parity")
        assert diagnosis.layer_classes == ("vllm.model_executor.models.qwen3.Qwen3DecoderLayer",)
        assert diagnosis.experiment is not None
        assert {layer["convention"] for layer in diagnosis.experiment["experiment"]["layers"]} == {"fused"}

    @pytest.mark.breadth
    def test_a_model_without_a_reference_is_refused(self, tmp_path: Path) -> None:
        refused = diagnose(tiny_config_of("HeliumForCausalLM", tmp_path), layers=[1], run=True)
        assert refused.proof == "experiment"
        assert "HeliumDecoderLayer, whose steering was never compared" in refused.problems[0]

    def test_a_model_without_a_reference_runs_by_leave(self, tmp_path: Path) -> None:
        model = tiny_config_of("HeliumForCausalLM", tmp_path)
        allowed = diagnose(model, layers=[1], run=True, unproven_model="experiment")
        assert allowed.is_fit
        assert allowed.proof == "experiment"


def test_every_problem_is_listed_not_only_the_first(folder: ConfigFolder, directions: Callable[..., Path]) -> None:
    diagnosis = diagnose(
        folder("bloom"), layers=[1, NUM_LAYERS], directions=directions(2, size=HIDDEN_SIZE + 1), runner="pooling"
    )
    says = (f"layer {NUM_LAYERS}", "a pooling model", "BloomForCausalLM", f"{HIDDEN_SIZE + 1} elements", "'kind@2'")
    assert len(diagnosis.problems) == len(says)
    for problem, part in zip(diagnosis.problems, says, strict=True):
        assert part in problem


def test_float16_is_refused_where_the_stream_is_rescaled_in_it(folder: ConfigFolder) -> None:
    model = folder("deepseekv2")
    (problem,) = diagnose(model, dtype="float16").problems
    assert "float16" in problem
    assert problem == refusal_at_start(model, dtype="float16", additional_config=steer_config(layers=[1]))
    assert diagnose(model, dtype="bfloat16").is_fit


def test_directions_bring_their_layers(folder: ConfigFolder, directions: Callable[..., Path]) -> None:
    diagnosis = diagnose(folder("gpt2"), directions=directions(1, 3))
    assert diagnosis.is_fit
    assert diagnosis.layers == (1, 3)
    assert diagnosis.directions == ("kind@1", "kind@3")


def test_a_direction_beyond_the_hooked_layers_does_not_fit(
    folder: ConfigFolder, directions: Callable[..., Path]
) -> None:
    (problem,) = diagnose(folder("gpt2"), layers=[0, 1], directions=[directions(1, 3)]).problems
    assert "'kind@3'" in problem
    assert "[0, 1]" in problem


def test_an_unreadable_direction_file_is_named(folder: ConfigFolder, tmp_path: Path) -> None:
    with pytest.raises(BadDirectionFile, match="nothing-there"):
        diagnose(folder("gpt2"), directions=tmp_path / "nothing-there.safetensors")


BROKEN_CONFIGS = {
    "no config": None,
    "empty file": "",
    "not JSON": '{"model_type": "llama"',
    "a list": "[]",
    "empty object": "{}",
    "unknown model type": '{"model_type": "nothing-known", "architectures": ["NothingForCausalLM"]}',
    "unknown architecture": '{"model_type": "llama", "architectures": ["NothingForCausalLM"]}',
    "a field of the wrong type": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}',
}


@pytest.mark.parametrize("text", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_config_that_cannot_be_read_is_one_clear_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(SettingsError) as refusal:
        diagnose(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_path_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(SettingsError, match="/no/such/folder"):
        diagnose("/no/such/folder")


class TestCommand:
    @pytest.fixture(autouse=True)
    def _environment_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else the command would set it for later tests too

    def test_the_table_answers_each_question(self, folder: ConfigFolder, directions: Callable[..., Path]) -> None:
        result = CliRunner().invoke(app, ["doctor", str(folder("llama")), "--directions", str(directions(2))])
        assert result.exit_code == 0
        for answer in ("LlamaForCausalLM", "0 to 3", "128", "classic", "kind@2", "yes"):
            assert answer in result.stdout

    def test_what_would_be_refused_ends_in_exit_code_one(self, folder: ConfigFolder) -> None:
        result = CliRunner().invoke(app, ["doctor", str(folder("bloom"))])
        assert result.exit_code == 1
        assert "BloomForCausalLM" in result.stdout

    def test_json_holds_the_whole_diagnosis(self, folder: ConfigFolder) -> None:
        result = CliRunner().invoke(app, ["doctor", str(folder("llama")), "--layers", "1,9", "--json"])
        assert result.exit_code == 1
        answer = json.loads(result.stdout)
        assert answer["is_fit"] is False
        assert answer["layers"] == [1, 9]
        assert answer["problems"] == list(diagnose(folder("llama"), layers=[1, 9]).problems)
