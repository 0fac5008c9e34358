"""Admission: names to slots and layers to hook numbers, digests by content, refusals before anything runs."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from msgspec import msgpack

from tests.support.plans import in_halves
from vllm_steer.directions import Direction
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.request_intake import salt
from vllm_steer.engine.resolved_spec import Resolved, Window
from vllm_steer.errors import (
    AmbiguousDirection,
    BadAlpha,
    BadCondition,
    BadOp,
    BadReadout,
    BadSpan,
    LayerNotHooked,
    SteerError,
    TooManyEntries,
    UnknownDirection,
)
from vllm_steer.plan.batch_plan import Entry, Pooling
from vllm_steer.plan.entry_rows import ABOVE, BELOW, CLAMP, HELD_SHIFT, KEEP_NORM, PROBE, PROMPT, RELATIVE, STORED
from vllm_steer.plan.trace_columns import HELD
from vllm_steer.schema.conditions import Watch, When
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.settings import SteerSettings

SIZE = 8
HOOKED = (8, 12, 20)
PROMPT_LEN = 5
RNG = np.random.default_rng(0)
KIND, COLD = (Direction("x", 0, RNG.standard_normal(SIZE)).normalised().vector for _ in range(2))


@pytest.fixture
def admission() -> Admission:
    made = Admission(
        SteerSettings(layers=HOOKED, max_entries=2, max_alpha=10.0, max_directions=16, trace_columns=2), SIZE
    )
    made.registry.register(
        [
            Direction("kind", 12, KIND),
            Direction("cold", 12, COLD),
            Direction("kind-again", 12, KIND),
            Direction("both", 8, KIND),
            Direction("both", 20, COLD),
            Direction("long", 12, 3 * KIND),
            Direction("elsewhere", 13, KIND),
        ]
    )
    return made


def resolve(admission: Admission, *steering: Steering, readout: Readout | None = None) -> Resolved:
    return admission.resolve("id", RequestSpec(steering, readout), PROMPT_LEN)


def digests(admission: Admission, *steering: Steering) -> tuple[str, str]:
    resolved = resolve(admission, *steering)
    return at(resolved, 0).digest, at(resolved, PROMPT_LEN).digest


def sent(resolved: Resolved) -> Resolved:
    """What a worker makes of it: vLLM sends parameters as msgpack, which knows lists but no tuples."""
    return Resolved.load(msgpack.decode(msgpack.encode(resolved.dump())))


def at(resolved: Resolved, position: int) -> Window:
    """The window that holds a position."""
    return [window for window in resolved.windows if window.start <= position][-1]


def test_a_refused_entry_is_named_by_its_place(admission: Admission) -> None:
    entries = (Steering("kind", 1.0), Steering("nobody", 1.0))
    with pytest.raises(UnknownDirection) as refused:
        admission.check(RequestSpec(entries))
    assert refused.value.param == "steering[1]"


def test_names_become_slots_and_layers_become_hook_numbers(admission: Admission) -> None:
    resolved = resolve(
        admission, Steering("kind", 4), Steering("both", 2, layer=20, op="set"), Steering("cold", op="ablate", layer=8)
    )
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    assert at(resolved, 0).entries == at(resolved, PROMPT_LEN).entries
    assert at(resolved, 0).entries == [
        (0, slot["cold", 12], 0.0, -1.0, 0, 0, 0.0),
        (1, slot["kind", 12], 4.0, 0.0, 0, 0, 0.0),
        (2, slot["both", 20], 2.0, -1.0, 0, 0, 0.0),
    ]
    assert (resolved.request_id, resolved.prompt_len, resolved.readout) == ("id", PROMPT_LEN, None)


@pytest.mark.parametrize(
    ("steering", "entry"),
    [
        (Steering("kind", 0.5, op="ablate"), (0.0, -0.5, 0)),
        (Steering("kind", 3, op="scale"), (0.0, 2.0, 0)),
        (Steering("kind", 0, op="scale", keep_norm=True), (0.0, -1.0, KEEP_NORM)),
        (Steering("kind", 0.5, relative=True), (0.5, 0.0, RELATIVE)),
        (Steering("kind", 0.5, op="set", relative=True, keep_norm=True), (0.5, -1.0, RELATIVE | KEEP_NORM)),
        (Steering("kind", op="clamp", low=0, high=0), (0.0, 0.0, CLAMP)),
        (Steering("kind", op="clamp", low=-1), (-1.0, inf, CLAMP)),
        (Steering("kind", op="clamp", high=0.5, relative=True), (-inf, 0.5, CLAMP | RELATIVE)),
    ],
    ids=repr,
)
def test_each_operation_is_one_entry(admission: Admission, steering: Steering, entry: tuple[float, float, int]) -> None:
    (resolved,) = at(resolve(admission, steering), 0).entries
    assert resolved[2:5] == entry


def test_a_condition_at_the_entry_s_own_layer_is_part_of_it(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    above = Steering("kind", 4, when=When("cold", above=0.25))
    (entry,) = at(resolve(admission, above), 0).entries
    assert entry == (1, slot["kind", 12], 4.0, 0.0, ABOVE, slot["cold", 12], 0.25)
    below = Steering("kind", 4, layer=20, keep_norm=True, when=When("long", below=-1, layer=20))
    (entry,) = at(resolve(admission, below), 0).entries
    assert entry == (2, slot["kind", 12], 4.0, 0.0, KEEP_NORM | BELOW, slot["long", 12], -1.0)
    assert resolve(admission, above).slots == tuple(sorted({slot["kind", 12], slot["cold", 12]}))
    assert dict(resolve(admission, above).contents).keys() == {slot["kind", 12], slot["cold", 12]}


def test_a_condition_at_an_earlier_layer_reads_a_probe_behind_that_layer_s_entries() -> None:
    admission = Admission(SteerSettings(layers=HOOKED, max_entries=3), SIZE)
    admission.registry.register([Direction("kind", 12, KIND), Direction("cold", 12, COLD), Direction("both", 8, KIND)])
    slot = {one.name: one.slot for one in admission.registry.all()}
    asked = [
        Steering("kind", 4, layer=20, span="generated", when=When("both", above=0.5)),
        Steering("kind", 2, when=When("cold", below=0.75, layer=8)),
        Steering("cold", 1, layer=20, span="generated", when=When("both", below=0.1)),
        Steering("cold", 3, layer=8),
    ]
    resolved = resolve(admission, *asked)
    assert at(resolved, 0).entries == [
        (0, slot["cold"], 3.0, 0.0, 0, 0, 0.0),
        (0, slot["cold"], 0.0, 0.0, PROBE, 0, 0.0),
        (1, slot["kind"], 2.0, 0.0, BELOW | STORED, 0, 0.75),
    ]
    assert [(one.layer_index, one.mode, one.gate) for one in at(resolved, PROMPT_LEN).entries] == [
        (0, 0, 0),
        (0, PROBE, 0),
        (0, PROBE, 1),
        (1, BELOW | STORED, 0),
        (2, ABOVE | STORED, 1),
        (2, BELOW | STORED, 1),
    ]
    assert resolved.slots == (0, 1, 2)
    with pytest.raises(TooManyEntries, match="4 entries at layer 8; allowed: 3"):
        resolve(admission, *asked, Steering("cold", 3, layer=8, span="generated"))


CONDITIONS: list[tuple[When, int, type[SteerError], str]] = [
    (When("nobody", above=1), 12, UnknownDirection, "'nobody'"),
    (When("both", above=1), 12, AmbiguousDirection, "'both'"),
    (When("kind", above=1, layer=13), 12, LayerNotHooked, "layer 13"),
    (When("kind", above=1), 8, BadCondition, "looks at layer 12 and its entry acts at layer 8"),
]


@pytest.mark.parametrize(("when", "layer", "refusal", "told"), CONDITIONS)
def test_a_condition_that_cannot_be_evaluated_is_refused(
    admission: Admission, when: When, layer: int, refusal: type[SteerError], told: str
) -> None:
    with pytest.raises(refusal, match=told):
        resolve(admission, Steering("kind", 1, layer=layer, when=when))


def test_too_many_probes_and_probes_across_stages_are_refused() -> None:
    settings = SteerSettings(layers=(1, 2, 3, 4, 5, 6))
    admission = Admission(settings, SIZE)
    admission.registry.register([Direction("kind", 1, KIND)])
    asked = [Steering("kind", 1, layer=6, when=When("kind", above=1, layer=layer)) for layer in (1, 2, 3, 4, 5)]
    resolve(admission, *asked[:4])
    with pytest.raises(BadCondition, match=r"look at 5 pairs .* allowed: 4"):
        resolve(admission, *asked)
    staged = Admission(settings, SIZE, num_stages=2)
    staged.registry.register([Direction("kind", 1, KIND)])
    resolve(staged, Steering("kind", 1, when=When("kind", above=1)))
    with pytest.raises(BadCondition, match="pipeline parallelism"):
        resolve(staged, asked[0])
    resolve(staged, Steering("kind", 1, span="generated", when=When("kind", above=1, over="prompt")))
    with pytest.raises(BadCondition, match="pipeline parallelism"):
        resolve(staged, Steering("kind", 1, layer=6, span="response", when=When("kind", above=1, over="prompt")))


def test_a_condition_over_the_prompt_probes_the_prompt_and_compares_the_sum(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    over = [When("both", layer=8, above=0.5, over="prompt"), When("cold", below=-0.25, over="prompt")]
    resolved = resolve(
        admission,
        Steering("kind", 4, span="response", when=over[0]),
        Steering("cold", 2, layer=20, span="generated", when=over[1]),
        Steering("cold", 3, layer=8, span="prompt[:2]"),
    )
    probes = [(0, slot["both", 8], 0.0, 0.0, PROBE, 0, 0.0), (1, slot["cold", 12], 0.0, 0.0, PROBE, 1, 0.0)]
    first = (1, slot["kind", 12], 4.0, 0.0, ABOVE | PROMPT, 0, 0.5 * PROMPT_LEN)
    second = (2, slot["cold", 12], 2.0, 0.0, BELOW | PROMPT, 1, -0.25 * PROMPT_LEN)
    assert [(one.start, one.entries) for one in resolved.windows] == [
        (0, [(0, slot["cold", 12], 3.0, 0.0, 0, 0, 0.0), *probes]),
        (2, probes),
        (PROMPT_LEN - 1, [probes[0], first, probes[1]]),
        (PROMPT_LEN, [first, second]),
    ]
    assert [bool(one.digest) for one in resolved.windows] == [True, False, True, True]
    assert resolved.looks_at_prompt
    assert resolved.plan().summed_prompt == PROMPT_LEN
    assert set(resolved.slots) == {slot["both", 8], slot["cold", 12], slot["kind", 12]}
    assert dict(resolved.contents).keys() == set(resolved.slots)
    plain = resolve(admission, Steering("kind", 4, when=When("both", layer=8, above=0.5)))
    assert not plain.looks_at_prompt
    assert plain.plan().summed_prompt == 0


def test_counted_conditions_are_marked_and_change_no_digest(admission: Admission) -> None:
    steering = (
        Steering("kind", 1, layer=20, span="response", when=When("cold", layer=8, above=0)),
        Steering("kind", 0, when=When("cold", above=0)),  # changes nothing
        Steering("kind", 2, span="generated", when=When("cold", above=0.5, over="prompt")),
        Steering("cold", 1, when=When("kind", below=0)),
    )
    plain, told = (resolve(admission, *steering, readout=Readout([12], held=held)) for held in (False, True))
    assert [one.digest for one in plain.windows] == [one.digest for one in told.windows]
    assert told.readout is not None
    assert told.readout.num_held == 4
    assert [(one.number, one.layer_index, one.gate, one.threshold) for one in told.readout.held] == [
        (2, 1, 0, 0.5 * PROMPT_LEN),
        (3, 1, -1, 0.0),
        (0, 2, -1, 0.0),
    ]
    assert [one.number for one in told.readout.counted] == [3, 0]
    marks = {one.mode >> HELD_SHIFT for one in at(told, PROMPT_LEN).entries}
    assert marks == {0, 1, 4}, "probes, and the conditions on tokens by their number from 1"
    assert sent(told).readout.pooling() == told.readout.pooling()  # type: ignore[union-attr]
    assert plain.readout is not None
    assert (plain.readout.held, plain.readout.num_held) == ([], None)
    assert not any(one.mode >> HELD_SHIFT for one in at(plain, PROMPT_LEN).entries)
    with pytest.raises(BadReadout, match=r"3 directions to trace .* with held, conditions on tokens.; allowed: 2"):
        resolve(admission, *steering, readout=Readout([12], held=True, trace=["kind"]))


@pytest.mark.parametrize("bound", [3e38, -3e38])
def test_a_bound_that_no_sum_reaches_stays_a_number(admission: Admission, bound: float) -> None:
    resolved = resolve(admission, Steering("kind", 4, span="generated", when=When("cold", above=bound, over="prompt")))
    assert abs(at(resolved, PROMPT_LEN).entries[0].threshold) == np.finfo(np.float32).max


@pytest.mark.parametrize("span", ["response", "prompt[-1]"])
def test_a_condition_over_the_prompt_cannot_gate_its_last_token_at_the_same_layer(
    admission: Admission, span: str
) -> None:
    with pytest.raises(BadCondition, match=r"at the same layer, .* allowed: a condition at an earlier hooked layer"):
        resolve(admission, Steering("kind", 1, span=span, when=When("cold", above=1, over="prompt")))
    resolve(admission, Steering("kind", 1, span=span, when=When("cold", layer=8, above=1, over="prompt")))


def test_what_a_condition_over_the_prompt_gates_depends_on_where_the_prompt_ends(admission: Admission) -> None:
    """The tokens alone do not say it: the fifth generated token of one prompt may be the fourth of a longer one."""
    when = When("cold", above=0, over="prompt")

    def digest_of(span: str, prompt_len: int, when: When = when) -> str:
        spec = RequestSpec((Steering("kind", 4, span=span, when=when),))
        resolved = admission.resolve("id", spec, prompt_len)
        assert resolved.windows[-1].start == PROMPT_LEN + 4
        assert not resolved.windows[0].digest, "an unsteered prompt is everyone's"
        return resolved.windows[-1].digest

    assert digest_of("generated[4:]", PROMPT_LEN) != digest_of("generated[3:]", PROMPT_LEN + 1)
    others = [When("cold", above=0), When("cold", above=1, over="prompt"), When("kind", above=0, over="prompt")]
    others += [When("cold", below=0, over="prompt"), When("cold", above=0, layer=8, over="prompt")]
    assert len({digest_of("generated[4:]", PROMPT_LEN, one) for one in (when, *others)}) == 6
    on_tokens = When("cold", above=0)
    assert digest_of("generated[4:]", PROMPT_LEN, on_tokens) == digest_of("generated[3:]", PROMPT_LEN + 1, on_tokens)


def test_what_leaves_the_stream_as_it_is_takes_no_entry(admission: Admission) -> None:
    for steering in (Steering("kind", 1, op="scale", keep_norm=True), Steering("kind", 0, relative=True)):
        assert at(resolve(admission, steering), 0) == at(resolve(admission), 0)


def test_the_same_content_under_two_names_has_one_digest(admission: Admission) -> None:
    assert digests(admission, Steering("kind", 4)) == digests(admission, Steering("kind-again", 4))
    assert digests(admission, Steering("kind", 4, layer=8)) == digests(admission, Steering("both", 4, layer=8))
    assert digests(admission, Steering("kind", op="ablate")) == digests(admission, Steering("kind", 0, op="set"))


def test_new_content_under_the_same_name_has_a_new_digest(admission: Admission) -> None:
    before = digests(admission, Steering("kind", 4))
    admission.registry.register([Direction("kind", 12, COLD)])
    after = digests(admission, Steering("kind", 4))
    assert after != before
    assert after == digests(admission, Steering("cold", 4))


@pytest.mark.parametrize(
    "other",
    [
        Steering("cold", 4),
        Steering("kind", 4.5),
        Steering("kind", -4),
        Steering("kind", 4, layer=8),
        Steering("kind", 4, op="set"),
        Steering("kind", op="ablate"),
        Steering("long", 4),
        Steering("kind", 4, relative=True),
        Steering("kind", 4, keep_norm=True),
        Steering("kind", 4, op="scale"),
        Steering("kind", op="clamp", high=4),
        Steering("kind", 4, when=When("cold", above=0)),
    ],
    ids=repr,
)
def test_any_difference_in_content_is_a_difference_in_digest(admission: Admission, other: Steering) -> None:
    assert digests(admission, Steering("kind", 4))[0] != digests(admission, other)[0]


def test_any_difference_in_a_condition_is_a_difference_in_digest(admission: Admission) -> None:
    conditions = [
        When("cold", above=0),
        When("cold", below=0),
        When("cold", above=0.5),
        When("kind", above=0),
        When("cold", above=0, layer=8),
        When("kind-again", above=0, layer=8),
    ]
    found = {digests(admission, Steering("kind", 4, when=when))[0] for when in conditions}
    assert len(found) == len(conditions)
    same = Steering("kind", 4, when=When("kind-again", above=0))
    assert digests(admission, same) == digests(admission, Steering("kind", 4, when=When("kind", above=0)))


def test_alpha_0_of_add_is_dropped_and_of_set_is_not(admission: Admission) -> None:
    nothing = resolve(admission, Steering("kind", 0), Steering("cold", -0.0))
    assert (at(nothing, 0).entries, at(nothing, PROMPT_LEN).entries) == ([], [])
    assert (at(nothing, 0).digest, at(nothing, PROMPT_LEN).digest) == ("", "")
    mixed = digests(admission, Steering("cold", 0), Steering("kind", 4))
    assert mixed == digests(admission, Steering("kind", 4))
    assert len(at(resolve(admission, Steering("kind", 0, op="set")), 0).entries) == 1


def test_order_counts_within_a_layer_and_not_across_layers(admission: Admission) -> None:
    here, after = Steering("kind", op="ablate"), Steering("cold", 2)
    assert digests(admission, here, after) != digests(admission, after, here)
    assert [entry[1:] for entry in at(resolve(admission, here, after), 0).entries] == list(
        reversed([entry[1:] for entry in at(resolve(admission, after, here), 0).entries])
    )
    elsewhere = Steering("kind", 3, layer=20)
    assert resolve(admission, here, elsewhere, after) == resolve(admission, elsewhere, here, after)
    assert resolve(admission, here, elsewhere, after) == resolve(admission, here, after, elsewhere)


def test_spans_are_split_into_prompt_and_generated_entries(admission: Admission) -> None:
    resolved = resolve(
        admission, Steering("kind", 1, span="prompt"), Steering("kind", 2, span="generated"), Steering("cold", 3)
    )
    assert [entry[2] for entry in at(resolved, 0).entries] == [1.0, 3.0]
    assert [entry[2] for entry in at(resolved, PROMPT_LEN).entries] == [2.0, 3.0]
    assert at(resolved, 0).digest != at(resolved, PROMPT_LEN).digest
    assert digests(admission, Steering("kind", 1, span="prompt"))[1] == ""
    assert digests(admission, Steering("kind", 1, span="generated"))[0] == ""
    assert len(set(digests(admission, Steering("kind", 1)))) == 1
    # one entry for both spans is the same content as one for each
    split = (Steering("kind", 1, span="prompt"), Steering("kind", 1, span="generated"))
    assert digests(admission, *split) == digests(admission, Steering("kind", 1))


def test_each_window_has_the_entries_of_the_spans_that_hold_its_tokens(admission: Admission) -> None:
    resolved = resolve(admission, Steering("kind", 1, span="response"), Steering("cold", 2, span="prompt[:2]"))
    found = [(window.start, [entry[2] for entry in window.entries]) for window in resolved.windows]
    assert found == [(0, [2.0]), (2, []), (PROMPT_LEN - 1, [1.0])]
    assert resolved.windows[1].digest == ""
    # windows whose entries have the same content are one
    same = (Steering("kind", 1, span="prompt[:2]"), Steering("kind-again", 1, span="prompt[2:]+generated"))
    assert [window.start for window in resolve(admission, *same).windows] == [0]


def test_a_span_without_a_token_of_this_prompt_is_refused(admission: Admission) -> None:
    for span in (f"prompt[{PROMPT_LEN}:]", f"generated+prompt[{-PROMPT_LEN - 1}]"):
        for steering in (Steering("kind", 1, span=span), Steering("kind", 0, span=span)):
            with pytest.raises(BadSpan, match=f"holds no token of a prompt of {PROMPT_LEN} tokens"):
                resolve(admission, steering)
        admission.check(RequestSpec((Steering("kind", 1, span=f"prompt[{PROMPT_LEN}:]"),)))


def test_a_slice_behind_the_last_computed_token_is_refused(admission: Admission) -> None:
    late = Steering("kind", 1, span="prompt+generated[3:]")
    for spec in (RequestSpec((late,)), RequestSpec(readout=Readout([8], span="generated[3:]"))):
        admission.resolve("id", spec, PROMPT_LEN, num_computed=PROMPT_LEN + 4)
        with pytest.raises(BadSpan, match=r"'generated\[3:\]' begins behind .* with max_tokens 4 the model computes"):
            admission.resolve("id", spec, PROMPT_LEN, num_computed=PROMPT_LEN + 3)
    admission.resolve("id", RequestSpec((Steering("kind", 1, span="generated"),)), PROMPT_LEN, num_computed=PROMPT_LEN)
    # The operator's default applies to short requests too.
    own = Admission(SteerSettings(layers=HOOKED, default_steering=(late,)), SIZE)
    own.registry.register([Direction("kind", 12, KIND)])
    spec = RequestSpec().with_default(own.settings.default_steering)
    own.resolve("id", spec, PROMPT_LEN, num_computed=PROMPT_LEN + 1)


def test_a_request_has_as_many_windows_as_there_is_room_for() -> None:
    admission = Admission(SteerSettings(layers=HOOKED, max_windows=2), SIZE)
    admission.registry.register([Direction("kind", 12, KIND)])
    spans = ["prompt[0]", "prompt[2:]+generated", "generated[1:]"]
    entries = [Steering("kind", 1.0 + n, span=span) for n, span in enumerate(spans)]
    resolve(admission, *entries[:2])
    with pytest.raises(TooManyEntries, match=r"into 3 windows .*; allowed: 2"):
        resolve(admission, *entries)


def test_as_many_entries_as_there_is_room_for_count_by_layer_and_token(admission: Admission) -> None:
    one = Steering("kind", 1)
    resolve(admission, one, one, Steering("kind", 1, layer=8), Steering("kind", 1, layer=20))
    resolve(admission, *(Steering("kind", 1, span=span) for span in ("prompt", "prompt", "generated", "generated")))
    resolve(admission, one, one, Steering("kind", 0))  # a dropped entry takes no place
    with pytest.raises(TooManyEntries, match="3 entries at layer 12; allowed: 2"):
        resolve(admission, one, one, one)
    with pytest.raises(TooManyEntries):
        resolve(admission, one, one, Steering("kind", 1, span="generated"))


REFUSED: list[tuple[Steering, type[SteerError], str]] = [
    (Steering("kind", 10.5), BadAlpha, "alpha is 10.5 at layer 12; allowed: up to 10"),
    (Steering("kind", -11), BadAlpha, "alpha is -11"),
    (Steering("kind", 11, relative=True), BadAlpha, "alpha is 11"),
    (Steering("kind", 11.5, op="scale"), BadAlpha, "adds up to 10.5"),
    (Steering("kind", op="clamp", low=-10.5, high=1), BadAlpha, "adds up to 10.5"),
    (Steering("long", 2, op="scale"), BadOp, "'long', whose norm is not 1"),
    (Steering("long", op="clamp", low=2), BadOp, "'long', whose norm is not 1"),
    (Steering("long", op="ablate"), BadOp, "'long', whose norm is not 1"),
    (Steering("long", 1, op="set"), BadOp, "'long', whose norm is not 1"),
    (Steering("kind", 1, layer=13), LayerNotHooked, r"layer 13 is not hooked; hooked: \[8, 12, 20\]"),
    (Steering("elsewhere", 1), LayerNotHooked, "layer 13"),
    (Steering("kidn", 1), UnknownDirection, "'kidn'"),
    (Steering("both", 1), AmbiguousDirection, r"'both' belongs to layers \[8, 20\]"),
    (Steering("kind", 0, layer=13), LayerNotHooked, "layer 13"),  # an entry with α 0 is dropped, its errors are not
]


@pytest.mark.parametrize(("steering", "refusal", "message"), REFUSED)
def test_what_the_engine_cannot_do_is_refused(
    admission: Admission, steering: Steering, refusal: type[SteerError], message: str
) -> None:
    with pytest.raises(refusal, match=message) as caught:
        resolve(admission, steering)
    assert type(caught.value) is refusal


def test_the_largest_alpha_is_one_of_the_request_and_not_of_each_entry(admission: Admission) -> None:
    half = Steering("kind", 5.5)
    with pytest.raises(BadAlpha, match="adds up to 11 at layer 12; allowed: up to 10"):
        resolve(admission, half, Steering("cold", -5.5))
    # These do not add up: other tokens, another layer, and an op that adds nothing.
    resolve(admission, Steering("kind", 5.5, span="prompt"), Steering("cold", -5.5, span="generated"))
    resolve(admission, half, Steering("kind", 5.5, layer=20))
    resolve(admission, Steering("kind", 9.5), Steering("cold", op="ablate"))


def bounded(multiple: float, **more: Any) -> Admission:
    """Admission of an engine whose layer 12 has a mean residual norm of 10."""
    made = Admission(
        SteerSettings(layers=(12,), max_alpha_residual_norm=multiple, residual_norms={12: 10.0}, **more), SIZE
    )
    made.registry.register([Direction("kind", 12, KIND), Direction("cold", 12, COLD), Direction("long", 12, 24 * KIND)])
    return made


def test_a_bound_in_residual_norms_is_one_of_the_request_and_not_of_each_entry() -> None:
    admission = bounded(1.0)
    resolve(admission, Steering("kind", 10))
    for asked in ([Steering("kind", 10)] * 8, [Steering("kind", 6), Steering("cold", -4.1)]):
        with pytest.raises(BadAlpha, match="times the mean residual norm there, 10; allowed: up to 1 times"):
            resolve(admission, *asked)
    resolve(admission, Steering("kind", 10, span="prompt"), Steering("cold", 10, span="generated"))


def test_a_bound_in_residual_norms_counts_the_direction_s_length() -> None:
    admission = bounded(1.0)
    with pytest.raises(BadAlpha, match="can add a vector of length 24 "):
        resolve(admission, Steering("long", 1))
    resolve(admission, Steering("long", 10 / 24.001))


def test_a_bound_in_residual_norms_takes_what_is_in_lengths_of_the_stream_as_it_is() -> None:
    for multiple, refused in ((1.0, 1.1), (0.5, 0.6)):
        admission = bounded(multiple)
        for form in ({}, {"op": "set"}):
            resolve(admission, Steering("kind", multiple, relative=True, **form))
            with pytest.raises(BadAlpha, match=f"{refused:g} times the mean residual norm"):
                resolve(admission, Steering("kind", -refused, relative=True, **form))
        resolve(admission, Steering("kind", 1 + multiple, op="scale"))
        with pytest.raises(BadAlpha, match=f"{refused:g} times the mean residual norm"):
            resolve(admission, Steering("kind", 1 - refused, op="scale"))
        resolve(admission, Steering("kind", op="clamp", low=-10 * multiple))
        with pytest.raises(BadAlpha, match=f"{refused:g} times the mean residual norm"):
            resolve(admission, Steering("kind", op="clamp", high=10 * refused))
    with pytest.raises(BadAlpha, match=r"1[.]2 times the mean residual norm"):
        resolve(bounded(1.0), Steering("kind", 0.6, relative=True), Steering("cold", 6))
    with pytest.raises(BadAlpha, match="can add a vector of length 24 "):
        resolve(bounded(1.0), Steering("long", 0.1, relative=True))


def test_the_largest_alpha_counts_lengths_of_the_stream_where_they_are_known() -> None:
    admission = Admission(SteerSettings(layers=(12,), max_alpha=10.0, residual_norms={12: 10.0}), SIZE)
    admission.registry.register([Direction("kind", 12, KIND)])
    resolve(admission, Steering("kind", 1, relative=True))
    resolve(admission, Steering("kind", 2, op="scale"))
    for asked in (Steering("kind", 1.1, relative=True), Steering("kind", 2.1, op="scale")):
        with pytest.raises(BadAlpha, match="adds up to 11 "):
            resolve(admission, asked)


@pytest.mark.parametrize(
    ("asked", "norms", "how"),
    [
        (
            [Steering("kind", 3, op="scale")],
            {12: 42.0},
            "84 (scale of 'kind': |alpha - 1| = 2 times 42, the layer's me",
        ),
        (
            [Steering("kind", -2, relative=True)],
            {12: 42.0},
            "84 (relative add of 'kind': |alpha| = 2 times 42, the lay",
        ),
        ([Steering("kind", 85, op="scale")], {}, "84 (scale of 'kind': |alpha - 1| = 84, in lengths of the stream"),
        (
            [Steering("kind", 80), Steering("cold", op="clamp", low=-4, high=1)],
            {},
            "84 (add of 'kind': |alpha| = 80; clamp of 'cold': the larger of |low| and |high| = 4)",
        ),
        (
            [Steering("kind", 2, op="scale"), *[Steering("kind", 2)] * 4],
            {12: 76.0},
            "84 (scale of 'kind': |alpha - 1| = 1 times 76, the layer's mean residual norm; add of 'kind': "
            "|alpha| = 2; add of 'kind': |alpha| = 2; and 2 more)",
        ),
    ],
)
def test_a_count_that_is_no_alpha_of_the_request_says_how_it_came_about(
    asked: list[Steering], norms: dict[int, float], how: str
) -> None:
    admission = Admission(SteerSettings(layers=(12,), max_alpha=10.0, residual_norms=norms), SIZE)
    admission.registry.register([Direction("kind", 12, KIND), Direction("cold", 12, COLD)])
    with pytest.raises(BadAlpha) as caught:
        resolve(admission, *asked)
    assert f"what the entries count adds up to {how}" in str(caught.value)
    assert "at layer 12; allowed: up to 10" in str(caught.value)


def test_a_length_says_how_it_came_about() -> None:
    for asked, how in (
        (
            Steering("kind", 3, op="scale"),
            "20 (scale of 'kind': |alpha - 1| = 2 times 1, the direction's length, times 10,",
        ),
        (
            Steering("kind", 2, relative=True),
            "20 (relative add of 'kind': |alpha| = 2 times 1, the direction's length, t",
        ),
        (Steering("long", 1), "24 (add of 'long': |alpha| = 1 times 24, the direction's length)"),
    ):
        with pytest.raises(BadAlpha) as caught:
            resolve(bounded(1.0), asked)
        assert f"can add a vector of length {how}" in str(caught.value)


@pytest.mark.parametrize("form", [{"relative": True}, {"op": "scale"}], ids=["relative", "scale"])
def test_the_stream_cannot_be_multiplied_beyond_its_range(form: dict[str, Any]) -> None:
    """Each layer's entries are within the other bounds; together they would make the stream infinite."""
    hooked = tuple(range(4))
    admission = Admission(SteerSettings(layers=hooked, max_alpha=1000.0, max_entries=2), SIZE)
    admission.registry.register([Direction("kind", layer, KIND) for layer in hooked])
    everywhere = [Steering("kind", 200.0, layer=layer, **form) for layer in hooked]
    resolve(admission, *everywhere[:3])
    with pytest.raises(BadAlpha, match="over all layers; allowed: up to 1"):
        resolve(admission, *everywhere)
    resolve(admission, *(replace(one, keep_norm=True) for one in everywhere))  # each keeps the length
    # What is added has as much less room as it may then be multiplied.
    resolve(admission, Steering("kind", 1000.0, layer=3), *everywhere[:2])
    tight = Admission(SteerSettings(layers=hooked, max_alpha=1e30), SIZE)
    tight.registry.register([Direction("kind", layer, KIND) for layer in hooked])
    resolve(tight, Steering("kind", 2.0**48, layer=0))
    with pytest.raises(BadAlpha, match="so that the stream stays finite"):
        resolve(tight, Steering("kind", 2.0**48, layer=0), everywhere[1])


def test_the_default_counts_towards_the_bounds_as_a_request_s_own_steering_does() -> None:
    default = (Steering("kind", 6), Steering("cold", 6))
    with pytest.raises(BadAlpha):
        resolve(bounded(1.0, default_steering=default), *default)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2.0**15), ("bfloat16", 2.0**48), ("float32", 2.0**48)])
def test_what_the_engine_s_dtype_cannot_hold_is_refused(dtype: str, most: float) -> None:
    admission = Admission(SteerSettings(layers=(12,), max_alpha=1e30, max_entries=4), SIZE, dtype)
    peak = float(np.abs(KIND).max())
    admission.registry.register([Direction("kind", 12, KIND), Direction("long", 12, 1e6 * KIND)])
    resolve(admission, Steering("kind", 0.999 * most / peak))
    for asked in (
        [Steering("kind", 1.001 * most / peak)],
        [Steering("long", -1.001e-6 * most / peak)],
        [Steering("kind", 0.501 * most / peak), Steering("kind", -0.501 * most / peak)],
        [Steering("kind", 1.001 * most / peak, op="set", span="generated")],
    ):
        with pytest.raises(BadAlpha, match=f"of the {dtype} stream"):
            resolve(admission, *asked)


def test_a_direction_of_several_layers_is_the_one_at_the_hooked_layer() -> None:
    admission = Admission(SteerSettings(layers=(8, 12)), SIZE)
    admission.registry.register(
        [Direction("many", layer, (layer + 1) * KIND) for layer in (4, 8, 20)]
        + [Direction("none", layer, KIND) for layer in (1, 2)]
    )
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    assert at(resolve(admission, Steering("many", 2)), 0).entries == [(0, slot["many", 8], 2.0, 0.0, 0, 0, 0.0)]
    traced = resolve(admission, readout=Readout([12], trace=["many"])).readout
    assert traced is not None
    assert traced.trace == [("many", 0, slot["many", 8], 8, True)]
    with pytest.raises(LayerNotHooked, match=r"belongs to layers \[1, 2\]; hooked: \[8, 12\]"):
        resolve(admission, Steering("none", 1))
    with pytest.raises(AmbiguousDirection, match=r"belongs to layers \[4, 8, 20\] and layer 12 was asked"):
        resolve(admission, Steering("many", 2, layer=12))


def test_the_bound_itself_is_allowed_and_add_needs_no_unit_vector(admission: Admission) -> None:
    assert at(resolve(admission, Steering("long", -10)), 0).entries[0][2] == -10.0


@pytest.mark.parametrize(
    ("fields", "first", "end"),
    [
        ({"span": "prompt"}, 0, PROMPT_LEN),
        ({"span": "prompt", "skip_first": 4}, 4, PROMPT_LEN),
        ({"span": "generated"}, PROMPT_LEN, None),
        ({"span": "all"}, 0, None),
        ({"span": "all", "skip_first": 1}, 1, None),
    ],
)
def test_a_span_becomes_positions(admission: Admission, fields: dict[str, Any], first: int, end: int | None) -> None:
    readout = resolve(admission, readout=Readout([20, 8], **fields)).readout
    assert readout is not None
    assert (readout.first, readout.end) == (first, end)
    assert (readout.layers, readout.layer_indices) == ([8, 20], [0, 2])


@pytest.mark.parametrize("span", ["prompt", "all"])
@pytest.mark.parametrize("skip_first", [PROMPT_LEN, PROMPT_LEN + 1])
def test_skipping_the_whole_prompt_is_refused(admission: Admission, span: Any, skip_first: int) -> None:
    with pytest.raises(BadReadout, match=f"skip_first is {skip_first} and the prompt has {PROMPT_LEN} tokens"):
        resolve(admission, readout=Readout([8], span=span, skip_first=skip_first))


def test_projections_are_taken_at_the_layers_that_are_read_and_that_a_name_belongs_to(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}

    def projections(layers: list[int], *names: str) -> list[tuple[str, int, int]]:
        readout = resolve(admission, readout=Readout(layers, project=names)).readout
        assert readout is not None
        return readout.project

    assert projections([8, 12, 20], "both", "kind") == [
        ("both", 8, slot["both", 8]),
        ("both", 20, slot["both", 20]),
        ("kind", 12, slot["kind", 12]),
    ]
    assert projections([20], "both") == [("both", 20, slot["both", 20])]
    with pytest.raises(BadReadout, match=r"'kind', which belongs to layers \[12\]; the readout reads layers \[8\]"):
        projections([8], "kind")
    with pytest.raises(UnknownDirection):
        projections([8], "kidn")
    with pytest.raises(LayerNotHooked):
        projections([9, 12], "kind")


def test_a_trace_is_taken_at_the_direction_s_own_layer_read_or_not(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    admission.registry.register([Direction("late", 20, COLD)])
    readout = resolve(admission, readout=Readout([8], vectors=False, trace=["late", "kind"])).readout
    assert readout is not None
    assert readout.trace == [
        ("late", 2, admission.registry.find("late", 20, range(99)).slot, 20, True),
        ("kind", 1, slot["kind", 12], 12, True),
    ]


def test_the_largest_projections_are_traced_and_not_shown(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    asked = Readout([8, 12], project=["both", "kind"], trace=["kind"], pool="max")
    readout = resolve(admission, readout=asked).readout
    assert readout is not None
    assert (readout.pool, readout.project, readout.vectors) == ("max", [], False)
    assert readout.trace == [("kind", 1, slot["kind", 12], 12, True), ("both", 0, slot["both", 8], 8, False)]
    with pytest.raises(BadReadout, match=r"3 directions to trace .*; allowed: 2"):
        resolve(admission, readout=Readout([8, 12], project=["both", "kind", "cold"], pool="max"))


def test_watches_are_resolved_and_what_they_need_is_counted(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    stop, flag = Watch("kind", above=2.0, patience=3), Watch("both", below=-1.0, layer=8)
    readout = resolve(admission, readout=Readout(stop=stop, flag=[flag])).readout
    assert readout is not None
    assert readout.watch == [
        ("kind", 1, slot["kind", 12], 12, True, 2.0, 3, True),
        ("both", 0, slot["both", 8], 8, False, -1.0, 1, False),
    ]
    assert readout.stop == readout.watch[0]
    # nothing of the prompt is read, so all of it may come from the prefix cache
    assert (readout.layers, readout.first, readout.end, readout.watch_first) == ([], PROMPT_LEN, None, PROMPT_LEN)
    with pytest.raises(BadReadout, match=r"3 directions to trace .*; allowed: 2"):
        resolve(admission, readout=Readout([8], stop=stop, flag=[flag], trace=["cold"]))
    with pytest.raises(UnknownDirection, match="kidn"):
        resolve(admission, readout=Readout(stop=Watch("kidn", above=1.0)))
    with pytest.raises(LayerNotHooked, match="layer 13"):
        resolve(admission, readout=Readout(stop=Watch("kind", above=1.0, layer=13)))


def test_counts_of_conditions_stand_behind_traces_and_watches_and_need_their_span(admission: Admission) -> None:
    slot = {(one.name, one.layer): one.slot for one in admission.registry.all()}
    steering = Steering("kind", 4, when=When("cold", above=0))
    asked = Readout(stop=Watch("kind", above=2.0), span="all", held=True)
    readout = resolve(admission, steering, readout=asked).readout
    assert readout is not None
    assert (readout.layers, readout.first, readout.end, readout.watch_first) == ([], 0, None, PROMPT_LEN)
    assert readout.pooling().followed == ((1, slot["kind", 12]), (HELD, 0))
    assert resolve(admission, readout=asked).readout is not None, "no condition takes no column"
    rows = Readout([8], pool="rows", trace=["cold"], held=True)
    storing = Admission(admission.settings.model_copy(update={"max_rows": 99}), SIZE)
    storing.registry = admission.registry
    readout = resolve(storing, steering, readout=rows).readout
    assert readout is not None
    assert readout.pooling().followed == (readout.pooling().trace[0], (HELD, 0))
    with pytest.raises(BadReadout, match=r"3 directions to trace .* with held, conditions on tokens.; allowed: 2"):
        resolve(admission, steering, readout=replace(asked, flag=[Watch("cold", above=0)]))


def test_a_stop_is_refused_across_pipeline_stages(admission: Admission) -> None:
    staged = Admission(admission.settings, SIZE, num_stages=2)
    staged.registry = admission.registry
    watch = Watch("kind", above=2.0)
    assert resolve(staged, readout=Readout(flag=[watch])).readout is not None
    with pytest.raises(BadReadout, match="pipeline parallelism"):
        resolve(staged, readout=Readout(stop=watch))


def test_a_name_of_several_layers_is_traced_at_the_one_that_is_read(admission: Admission) -> None:
    readout = resolve(admission, readout=Readout([8], trace=["both"])).readout
    assert readout is not None
    assert readout.trace == [("both", 0, admission.registry.find("both", 8, range(99)).slot, 8, True)]


@pytest.mark.parametrize(
    ("trace", "refusal", "message"),
    [
        (["kidn"], UnknownDirection, "'kidn'"),
        (["both"], AmbiguousDirection, r"'both', which belongs to layers \[8, 20\]"),
        (["elsewhere"], LayerNotHooked, "layer 13"),
        (["kind", "cold", "long"], BadReadout, "3 directions to trace .*; allowed: 2"),
    ],
)
def test_a_trace_that_cannot_be_taken_is_refused(
    admission: Admission, trace: list[str], refusal: type[SteerError], message: str
) -> None:
    with pytest.raises(refusal, match=message) as caught:
        resolve(admission, readout=Readout([8, 20], trace=trace))
    assert type(caught.value) is refusal


def test_what_is_resolved_crosses_the_wire_to_the_worker_unchanged(admission: Admission) -> None:
    resolved = resolve(
        admission,
        Steering("kind", 4, span="prompt"),
        readout=Readout([8, 12], span="all", skip_first=1, trace=["cold"]),
    )
    arrived = sent(resolved)
    assert arrived.plan() == resolved.plan()
    assert arrived.plan() == in_halves(
        PROMPT_LEN,
        prompt=(Entry(1, at(resolved, 0).entries[0][1], 4.0, 0.0),),
        pooling=Pooling(
            (0, 1), 1, None, trace=((1, admission.registry.find("cold", 12, range(99)).slot),), watch_first=5
        ),
    )
    assert msgpack.encode(arrived.dump()) == msgpack.encode(resolved.dump())
    assert Resolved.load(resolve(admission).dump()).plan() == in_halves(PROMPT_LEN)


def test_configured_files_are_registered_at_start_up(tmp_path: Any) -> None:
    from vllm_steer.directions import save_directions

    save_directions(tmp_path / "d.safetensors", [Direction("kind", 12, KIND), Direction("kind", 8, COLD)])
    made = Admission(SteerSettings(layers=HOOKED, directions=(str(tmp_path / "d.safetensors"),)), SIZE)
    assert [(one.name, one.layer, one.slot) for one in made.registry.all()] == [("kind", 8, 0), ("kind", 12, 1)]


def test_remembered_readouts_are_bounded_and_the_oldest_go_first(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_steer.engine.front.admission._REMEMBERED_READOUTS", 2)
    for name in ("a", "b", "a", "c"):
        admission.remember(name, Readout([8]))
    assert list(admission.asked) == ["b", "c"]


def test_the_salt_tells_apart_both_its_parts() -> None:
    salts = {salt(own, digest) for own in (None, "tenant", "tenant2") for digest in ("a" * 64, "b" * 64)}
    assert len(salts) == 6
    assert salt(None, "a" * 64) == salt("", "a" * 64)


def ask_rows(
    admission: Admission, readout: Readout, num_computed: int | None = None, prompt_len: int = PROMPT_LEN
) -> Resolved:
    return admission.resolve("id", RequestSpec((), readout), prompt_len, num_computed=num_computed)


def test_more_rows_than_the_operator_allows_are_refused() -> None:
    admission = Admission(SteerSettings(layers=HOOKED, max_rows=8), SIZE)
    allowed = ask_rows(admission, Readout([8, 12], "prompt", skip_first=1, pool="rows")).readout
    assert allowed is not None
    assert (allowed.pool, allowed.vectors, allowed.pooling().stores_rows) == ("rows", False, True)
    assert ask_rows(admission, Readout([8], "all", pool="rows"), num_computed=8).readout is not None
    assert ask_rows(admission, Readout([8, 12, 20], "generated[1:]", pool="rows"), num_computed=8).readout is not None
    for readout, num_computed, said in (
        (Readout([8, 12], pool="rows"), None, "5 tokens at 2 layers, 10 rows; allowed: up to 8 rows"),
        (Readout([8], "all", pool="rows"), 9, "9 tokens at 1 layers, 9 rows; allowed: up to 8 rows.*lower max_tokens"),
        (Readout([8], "generated", pool="rows"), None, "max_tokens is not set; allowed: up to 8 rows"),
    ):
        with pytest.raises(BadReadout, match=said):
            ask_rows(admission, readout, num_computed)
    with pytest.raises(BadReadout, match="max_rows 0; allowed: the other pools"):
        ask_rows(Admission(SteerSettings(layers=HOOKED), SIZE), Readout([8], pool="rows"))


def test_rows_are_looked_at_before_the_prompt_is_known_as_far_as_that_goes() -> None:
    spec = RequestSpec((), Readout([8], "all", pool="rows"))
    Admission(SteerSettings(layers=HOOKED, max_rows=1), SIZE).check(spec)
    with pytest.raises(BadReadout, match="max_rows 0"):
        Admission(SteerSettings(layers=HOOKED), SIZE).check(spec)
