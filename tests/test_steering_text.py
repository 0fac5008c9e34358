"""Steering as a line of text: what a line means, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer import Steering
from vllm_steer.errors import BadAlpha, BadOp, BadSpan, MalformedSpec, SteerError
from vllm_steer.schema.steering_text import parse_steering


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("kind:8", [Steering("kind", 8.0)]),
        ("kind:-1.5e1@12", [Steering("kind", -15.0, 12)]),
        ("a:b:+2", [Steering("a:b", 2.0)]),
        ("kind:8@0;span=response", [Steering("kind", 8.0, 0, span="response")]),
        ("kind:8;span=prompt[-1]+generated[:16]", [Steering("kind", 8.0, span="prompt[-1]+generated[:16]")]),
        ("kind;op=ablate", [Steering("kind", op="ablate")]),
        ("kind@3;op=clamp;low=-2;high=2.5", [Steering("kind", layer=3, op="clamp", low=-2, high=2.5)]),
        ("kind:0.1;relative=true;keep_norm=true", [Steering("kind", 0.1, relative=True, keep_norm=True)]),
        ("kind:8, calm:-3@12 ; op=set", [Steering("kind", 8.0), Steering("calm", -3.0, 12, op="set")]),
    ],
)
def test_a_line_means_its_entries(text: str, entries: list[Steering]) -> None:
    assert list(parse_steering(text)) == entries


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", MalformedSpec),
        ("kind:8,", MalformedSpec),
        ("kind:eight", MalformedSpec),
        (":8", MalformedSpec),
        ("kind:8@x", MalformedSpec),
        ("kind:8@-1", MalformedSpec),
        ("kind:8@", MalformedSpec),
        ("kind=5", MalformedSpec),
        ("kind=5@12", MalformedSpec),
        ("kind 5", MalformedSpec),
        ("kind = 5", MalformedSpec),
        ("kind 5;op=add", MalformedSpec),
        ("kind;op=set", BadAlpha),
        ("kind:8;", MalformedSpec),
        ("kind:8;span", MalformedSpec),
        ("kind:8;span=", MalformedSpec),
        ("kind:8;spam=all", MalformedSpec),
        ("kind:8;op=set;op=add", MalformedSpec),
        ("kind:8;relative=1", MalformedSpec),
        ("kind:8;when={}", MalformedSpec),
        ("kind", BadAlpha),
        ("kind:nan", BadAlpha),
        ("kind:8;op=sett", BadOp),
        ("kind:8;span=everything", BadSpan),
    ],
)
def test_another_line_is_refused(text: str, error: type[SteerError]) -> None:
    with pytest.raises(error):
        parse_steering(text)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        entries = parse_steering(text)
    except SteerError:
        return
    assert entries
    for entry in entries:
        assert entry.direction in text


@pytest.mark.parametrize("text", ["kind=5", "kind=5@12", "kind 5", "kind", "kind@12", "kind;op=scale", "kind:x", ""])
def test_whoever_misses_the_form_is_shown_it(text: str) -> None:
    with pytest.raises(SteerError, match=r"direction:alpha\[@layer\].*such as kind:8@12") as caught:
        parse_steering(text, "the header X-Steering")
    assert f"the header X-Steering has {text!r}" in str(caught.value)


def test_a_refusal_names_the_place_and_the_text() -> None:
    with pytest.raises(MalformedSpec, match=r"the header X-Steering has 'kind:x'; allowed: direction:alpha"):
        parse_steering("kind:x", "the header X-Steering")
