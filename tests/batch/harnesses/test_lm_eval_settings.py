"""The model arguments of lm-eval's model `vllm-steer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_jobs.harnesses.lm_eval_settings import HookSettings, refuse_steering_in
from vllm_steer import Direction, Steering, save_directions
from vllm_steer.errors import BadCondition, BadDirectionFile, BadSpan, LayerNotHooked, SettingsError, UnknownDirection


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, layer in (("kind", 3), ("harm", 5)):
        save_directions(tmp_path / f"{name}.safetensors", [Direction(name, layer, np.ones(4))])
    return [str(tmp_path / f"{name}.safetensors") for name in ("kind", "harm")]


def parse(**fields: Any) -> HookSettings:
    return HookSettings.parse(
        **{"layers": None, "directions": None, "steering": None, "span": None, "steer": {}} | fields
    )


def test_layers_are_those_of_the_directions_or_the_given_ones(files: list[str]) -> None:
    for directions in (files, ";".join(files), tuple(map(Path, files))):
        assert parse(directions=directions).layers == (3, 5)
    for layers in (7, "7", "7;3", "3,7", [7, 3]):
        assert 7 in parse(directions=files, layers=layers).layers


def test_entries_take_the_span(files: list[str]) -> None:
    settings = parse(directions=files, steering="kind:2,harm:1@5", span="response")
    assert settings.entries == (Steering("kind", 2.0, span="response"), Steering("harm", 1.0, 5, span="response"))
    assert parse(directions=files).entries == ()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"steering": "nobody:1"}, UnknownDirection, "the direction files hold harm, kind"),
        ({"steering": "kind:1", "layers": 5}, LayerNotHooked, r"steering names layer 3; hooked: \[5\]"),
        ({"steering": "kind:1@4"}, LayerNotHooked, "names layer 4"),
        ({"steering": "", "span": None}, SettingsError, "steering is empty"),
        ({"span": "response"}, SettingsError, "there is no steering"),
        ({"steering": "kind:1", "span": "answer"}, BadSpan, "answer"),
        ({"directions": ""}, SettingsError, "directions is ''"),
        ({"directions": []}, SettingsError, r"directions is \[\]"),
        ({"directions": 5}, SettingsError, "directions is 5"),
        ({"directions": "none.safetensors"}, BadDirectionFile, "no direction file"),
        ({"layers": ""}, SettingsError, "layers is ''"),
        ({"layers": "3;x"}, SettingsError, "layers is '3;x'"),
        ({"layers": [-1]}, SettingsError, r"layers is \[-1\]"),
        ({"layers": True}, SettingsError, "layers is True"),
        ({"layers": 3.5}, SettingsError, "layers is 3.5"),
        ({"directions": None}, SettingsError, "no layers to hook"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_before_an_engine_starts(
    files: list[str], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse(**{"directions": files, **fields})


def test_a_condition_over_the_prompt_is_refused_for_generations_too(files: list[str]) -> None:
    when = {"direction": "harm", "above": 0.1, "layer": 3}
    entry = {"direction": "kind", "alpha": 1, "span": "generated", "when": when}
    with pytest.raises(LayerNotHooked):
        parse(directions=files, layers=5, steering=[entry])
    assert parse(directions=files, steering=[entry]).entries[0].when is not None
    with pytest.raises(BadCondition, match="condition over the prompt"):
        parse(directions=files, steering=[{**entry, "when": {**when, "over": "prompt"}}])


@pytest.mark.parametrize("nest", [None, "extra_args", "extra_body", "vllm_xargs"])
@pytest.mark.parametrize("name", ["steering", "readout", "vllm_steer"])
def test_generation_arguments_may_not_steer(nest: str | None, name: str) -> None:
    refuse_steering_in({"temperature": 0, "extra_args": {"a": 1}, "vllm_xargs": None})
    with pytest.raises(SettingsError, match=f"gen_kwargs has '{name}'"):
        refuse_steering_in({name: []} if nest is None else {nest: {name: []}})
