"""The settings of an engine: built by ``steer_config``, read back by ``parse``, wrong ones refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vllm_steer.errors import SettingsError
from vllm_steer.settings import CONFIG_KEY, SteerSettings, plugin_build, steer_config


def test_steer_config_is_plain_json_that_parse_reads_back() -> None:
    config = steer_config([12, 8, 12], max_entries=3, max_alpha=20)
    settings = SteerSettings.of(json.loads(json.dumps(config)))
    assert settings is not None
    assert settings.layers == (8, 12)
    assert (settings.max_entries, settings.max_alpha) == (3, 20.0)
    assert settings.as_config() == config[CONFIG_KEY]


@pytest.mark.parametrize("layers", [range(3), (2, 1, 0), [0, 1, 2]], ids=str)
def test_layers_may_be_any_sequence(layers: Any) -> None:
    assert steer_config(layers)[CONFIG_KEY]["layers"] == [0, 1, 2]


@pytest.mark.parametrize("as_type", [str, Path])
def test_direction_files_become_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_type: type[Any]
) -> None:
    """The engine may be another process with another working directory."""
    monkeypatch.chdir(tmp_path)
    one = steer_config([1], as_type("a.safetensors"))
    many = steer_config([1], [as_type("a.safetensors"), as_type("b.gguf")])
    assert one[CONFIG_KEY]["directions"] == [str(tmp_path / "a.safetensors")]
    assert many[CONFIG_KEY]["directions"] == [str(tmp_path / "a.safetensors"), str(tmp_path / "b.gguf")]
    assert steer_config([1], None)[CONFIG_KEY]["directions"] == []


def test_addresses_on_the_hub_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = "hf://someone/vectors@main/kind.safetensors"
    assert steer_config([1], url)[CONFIG_KEY]["directions"] == [url]
    both = steer_config([1], [url, "a.safetensors"])[CONFIG_KEY]["directions"]
    assert both == [url, str(tmp_path / "a.safetensors")]


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, "text"])
def test_a_config_without_the_key_is_not_configured(config: object) -> None:
    assert SteerSettings.of(config) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "layers"),
        ({"layers": []}, "layers"),
        ({"layers": 5}, "layers is 5"),
        ({"layers": "12"}, "layers is '12'"),
        ({"layers": [-1]}, "layers.0 is -1"),
        ({"layers": [True]}, "layers.0 is True"),
        ({"layers": [1.5]}, "layers.0 is 1.5"),
        ({"layers": [1], "directions": 3}, "directions"),
        ({"layers": [1], "max_entries": 0}, "max_entries is 0"),
        ({"layers": [1], "max_directions": 0}, "max_directions is 0"),
        ({"layers": [1], "max_alpha": 0}, "max_alpha is 0"),
        ({"layers": [1], "max_alpha": math.nan}, "max_alpha is nan"),
        ({"layers": [1], "max_alpha": math.inf}, "max_alpha is inf"),
        ({"layers": [1], "max_alpha": 1e39}, "max_alpha is 1e+39"),  # beyond float32, in which the tables hold α
        ({"layers": [1], "readout_store_mib": 0}, "readout_store_mib is 0"),
        (
            {"layers": [1], "max_entry": 3},
            "there is no setting max_entry. Perhaps you mean 'max_entries'. Allowed sett",
        ),
        ({}, "setting layers: Field required"),
        (
            {"layers": [1], "served_aliases": {"a": [{"alpha": 3}]}},
            "setting served_aliases.a.0: an entry of steering l",
        ),
        ({"layers": [1, 2], "registry_dir": "here"}, "registry_dir 'here' is relative"),
        ({"layers": [1, 2], "max_alpha_residual_norm": 1}, "max_alpha_residual_norm needs residual_norms of layers"),
        ({"layers": [1], "default_steering": [{"direction": "d", "alpha": 2000}]}, "default_steering has |alpha| of"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SteerSettings.parse(fields)
    message = str(caught.value)
    assert message.removeprefix("setting ").startswith(named.removeprefix("setting ")), "what is wrong comes first"
    assert "{'layers'" not in message, "the settings are not shown as a whole"
    assert "\n" not in message
    assert len(message) < 800
    assert ("Allowed settings: layers, directions" in message) == ("there is no setting" in message)


@pytest.mark.parametrize(
    ("entry", "how"),
    [
        (
            {"op": "scale", "alpha": 41},
            "(|alpha - 1| for scale; that and relative ones times the layer's mean residual",
        ),
        (
            {"relative": True, "alpha": 40},
            "(|alpha - 1| for scale; that and relative ones times the layer's mean resid",
        ),
        ({"alpha": 4000}, " at one layer; allowed: max_alpha, 1000; raise it"),
    ],
)
def test_the_operator_s_own_steering_beyond_the_bound_says_how_it_is_counted(entry: dict[str, Any], how: str) -> None:
    own = {"default_steering": [{"direction": "d", "layer": 1, **entry}], "residual_norms": {1: 100}}
    with pytest.raises(SettingsError, match=r"has \|alpha\| of 4000 at one layer") as caught:
        SteerSettings.parse({"layers": [1], **own})
    assert how in str(caught.value)


@pytest.mark.parametrize("layers", [5, None, "12", [-1], []])
def test_steer_config_refuses_what_parse_refuses(layers: Any) -> None:
    with pytest.raises(SettingsError, match="setting layers"):
        steer_config(layers)


def test_settings_that_are_no_object_are_refused() -> None:
    with pytest.raises(SettingsError, match="list"):
        SteerSettings.of({CONFIG_KEY: [1]})


def test_the_build_in_the_settings_is_that_of_the_code_that_reads_them() -> None:
    """vLLM hashes it into the key of its compile cache: with a stale one, an old graph would be used."""
    assert SteerSettings.parse({"layers": [1], "plugin_build": "0.0.1+stale"}).plugin_build == plugin_build()
    assert steer_config([1])[CONFIG_KEY]["plugin_build"] == plugin_build()
