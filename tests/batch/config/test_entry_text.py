"""Steering as other programs pass it on: short text, JSON, objects."""

from __future__ import annotations

from typing import Any

import pytest

from batch_jobs.config.entry_text import parse_entries
from vllm_steer import Steering
from vllm_steer.errors import SettingsError, SteerError

KIND = Steering("kind", 8.0, 16)


@pytest.mark.parametrize(
    "value",
    [
        "kind:8@16",
        " kind:8@16 ",
        '[{"direction": "kind", "alpha": 8, "layer": 16}]',
        '{"direction": "kind", "alpha": 8, "layer": 16}',
        {"direction": "kind", "alpha": 8, "layer": 16},
        ["kind:8@16"],
        (KIND,),
        KIND,
    ],
    ids=str,
)
def test_every_form_is_the_same_entry(value: object) -> None:
    assert parse_entries(value, where="steering") == (KIND,)


def test_several_entries_keep_their_order() -> None:
    assert parse_entries("b:1,a:b:-2.5@3", where="steering") == (Steering("b", 1.0), Steering("a:b", -2.5, 3))


def test_a_span_is_that_of_entries_without_their_own() -> None:
    entries: list[Any] = ["kind:1", {"direction": "kind", "alpha": 1}, {"direction": "kind", "alpha": 1, "span": "all"}]
    spans = [entry.span for entry in parse_entries(entries, where="steering", span="response")]
    assert spans == ["response", "response", "all"]


@pytest.mark.parametrize("value", ["", " ", [], "[]", ()], ids=repr)
def test_no_entries_are_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"steering is empty; .* Leave it out for the unsteered model"):
        parse_entries(value, where="steering")


@pytest.mark.parametrize("value", ["kind", "kind:", ":8", "kind:x", "kind:8@", "kind:8@x", 5, None, [None]], ids=repr)
def test_what_is_no_entry_is_refused(value: object) -> None:
    with pytest.raises(SteerError, match=r"allowed: (a line such as|direction:alpha|any finite number)"):
        parse_entries(value, where="steering")


def test_json_that_a_comma_has_split_is_told_so() -> None:
    with pytest.raises(SettingsError, match="A comma may have split it"):
        parse_entries('[{"direction": "kind"', where="steering")


@pytest.mark.parametrize("value", ['[{"direction": "kind", "alpha": 1, "op": "spin"}]', '[{"direction": "k", "a": 1}]'])
def test_what_steering_refuses_is_its_own_error(value: str) -> None:
    with pytest.raises(SteerError) as refused:
        parse_entries(value, where="steering")
    assert not isinstance(refused.value, SettingsError)
