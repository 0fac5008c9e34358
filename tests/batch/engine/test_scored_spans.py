"""Spans of a text that is scored hold the tokens of the generation that it stands for."""

from __future__ import annotations

import pytest

from batch_jobs.engine.scored_spans import refuse_prompt_conditions, scored_entries
from tests.support.span_reference import positions
from vllm_steer import Steering, When
from vllm_steer.errors import BadCondition, BadSpan

SPANS = [
    "all",
    "prompt",
    "generated",
    "response",
    "response[:3]",
    "generated[2:5]",
    "all[4:]",
    "prompt[-2:]",
    "prompt[:2] + response[1:3]",
    "prompt[-1] + generated[:1]",
]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("context", "continuation", "start"), [(1, 1, 0), (2, 6, 0), (2, 6, 3), (5, 1, 0), (7, 4, 8)])
def test_a_scored_text_is_steered_where_its_generation_is(
    span: str, context: int, continuation: int, start: int
) -> None:
    whole = context + continuation
    sent = whole - start
    entries = scored_entries([Steering("kind", 1.0, span=span)], context, sent, start=start)
    steered = {position + start for entry in entries for position in positions(entry.span, sent, sent)}
    assert steered == {position for position in positions(span, context, whole) if position >= start}


def test_an_entry_of_which_no_token_is_sent_goes() -> None:
    late, early = Steering("kind", 1.0, span="generated[4:]"), Steering("kind", 1.0, span="prompt")
    assert scored_entries([late], 3, 5) == []
    assert [entry.span for entry in scored_entries([late], 3, 9)] == ["prompt[7:9]"]
    assert scored_entries([early], 3, 5, start=3) == []


def test_what_is_no_span_stays_and_the_order_too() -> None:
    when = When("harm", above=0.5)
    entries = [
        Steering("kind", 2.0, 4, span="response", relative=True, when=when),
        Steering("harm", op="ablate"),
        Steering("kind", op="clamp", low=1.0, span="generated"),
    ]
    first, second, third = scored_entries(entries, 3, 5)
    assert first == Steering("kind", 2.0, 4, span="prompt[2:5]", relative=True, when=when)
    assert second is entries[1]
    assert third == Steering("kind", op="clamp", low=1.0, span="prompt[3:5]")


def test_a_part_that_the_generation_would_refuse_is_refused() -> None:
    with pytest.raises(BadSpan, match="holds no token"):
        scored_entries([Steering("kind", 1.0, span="prompt[5:]")], 3, 9)


def test_a_condition_over_the_prompt_is_refused_and_one_on_tokens_is_not() -> None:
    refuse_prompt_conditions([Steering("kind", 1.0), Steering("kind", 1.0, when=When("harm", above=0.1))])
    gated = Steering("kind", 1.0, span="generated", when=When("harm", above=0.1, over="prompt"))
    with pytest.raises(BadCondition, match="condition over the prompt; allowed here: conditions on tokens"):
        refuse_prompt_conditions([gated])
