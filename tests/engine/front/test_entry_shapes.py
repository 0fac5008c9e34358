"""What admission remembers of earlier requests changes neither what is resolved nor how a refusal is worded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_steer import errors
from vllm_steer.directions import Direction
from vllm_steer.engine.front import entry_shapes
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.entry_resolution import EntryResolution
from vllm_steer.engine.resolved_spec import Resolved
from vllm_steer.schema.conditions import When
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.settings import SteerSettings

SIZE, LAYERS = 4, (1, 3, 5)
SETTINGS = SteerSettings(
    layers=LAYERS,
    max_entries=3,
    max_windows=3,
    max_alpha=10.0,
    max_alpha_residual_norm=2.0,
    residual_norms={1: 6.0, 3: 7.0, 5: 8.0},
)
VECTORS = np.random.default_rng(0).standard_normal((4, SIZE))
KIND, COLD, LONG, OTHER = (Direction("kind", 1, one).normalised().vector for one in VECTORS)
SPANS = (
    "all",
    "prompt",
    "generated",
    "response",
    "prompt[-2:]",
    "prompt[3]",
    "generated[2:]",
    "prompt[:2] + generated",
)


def make_admission() -> Admission:
    admission = Admission(SETTINGS, SIZE, dtype="float16")
    directions = [("kind", 1, KIND), ("cold", 3, COLD), ("both", 1, COLD), ("both", 5, KIND), ("long", 3, 3 * LONG)]
    admission.registry.register([Direction(*one) for one in directions])  # type: ignore[attr-defined]
    return admission


WARM = make_admission()
"""Has seen all requests of the examples before."""


@st.composite
def entries(draw: st.DrawFn) -> Steering:
    """Entries, some of which are refused."""
    op = draw(st.sampled_from(["add", "add", "add", "set", "scale", "ablate", "clamp"]))
    alpha = draw(st.sampled_from([0.0, -0.0, 0.1, 1.0, -4.0, 4.1, 12.0]))
    fields: dict[str, Any] = {"alpha": 0.5 if op == "ablate" else alpha}
    if op == "clamp":
        fields = {"low": alpha}
    span = draw(st.sampled_from(SPANS))
    if draw(st.integers(0, 4)) == 0:
        over = "prompt" if span.startswith(("generated", "response")) and draw(st.booleans()) else "token"
        look = {"layer": draw(st.sampled_from([None, 1])), "over": over}
        fields["when"] = When(draw(st.sampled_from(["kind", "cold"])), above=draw(st.sampled_from([-0.0, 0.5])), **look)
    return Steering(
        draw(st.sampled_from(["kind", "kind", "cold", "cold", "both", "long", "nobody"])),
        layer=draw(st.sampled_from([None, 1, 3, 5, 5, 2])),
        op=op,
        span=span,
        relative=op in ("add", "set", "clamp") and draw(st.integers(0, 5)) == 0,
        keep_norm=draw(st.integers(0, 5)) == 0,
        **fields,
    )


def outcome(admission: Admission, spec: RequestSpec, prompt_len: int) -> Resolved | tuple[Any, ...]:
    """What admission makes of a request: the result, or the refusal with its words."""
    try:
        return admission.resolve("id", spec, prompt_len, num_computed=prompt_len + 3)
    except errors.SteerError as error:
        return type(error), str(error), error.param


@hypothesis_settings(max_examples=400, deadline=None)
@given(
    st.lists(entries(), max_size=5), st.lists(st.sampled_from([0.2, 1.0, -3.0, 30.0]), min_size=5), st.integers(1, 5)
)
def test_a_request_is_resolved_as_if_it_were_the_first(
    asked: list[Steering], alphas: list[float], prompt_len: int
) -> None:
    other = [
        Steering(**{name: getattr(one, name) for name in one.__match_args__} | {"alpha": alpha})
        if one.op in ("add", "set")
        else one
        for one, alpha in zip(asked, alphas, strict=False)
    ]
    for readout in (None, Readout([1], held=True)):
        for steering in (asked, other, asked):
            spec = RequestSpec(tuple(steering), readout)
            assert outcome(WARM, spec, prompt_len) == outcome(make_admission(), spec, prompt_len)


def test_entries_that_differ_in_alpha_alone_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = make_admission()
    admission.resolve("id", RequestSpec((Steering("kind", 1.0), Steering("cold", 2.0, op="set"))), 3)
    monkeypatch.setattr(EntryResolution, "resolve", None)
    resolved = admission.resolve("id", RequestSpec((Steering("kind", 1.5), Steering("cold", -2.0, op="set"))), 9)
    assert [(one.layer_index, one.a, one.b) for one in resolved.windows[0].entries] == [(0, 1.5, 0.0), (1, -2.0, -1.0)]
    for other in ("cold", "both"):
        with pytest.raises(TypeError):  # it is looked up, which cannot be done here
            admission.resolve("id", RequestSpec((Steering(other, 1.5, layer=1),)), 9)


def test_a_change_of_the_registry_is_seen_at_once() -> None:
    admission, spec = make_admission(), RequestSpec((Steering("kind", 1.0),))
    before = admission.resolve("id", spec, 3)
    admission.registry.register([Direction("kind", 1, OTHER)])  # type: ignore[attr-defined]
    after = admission.resolve("id", spec, 3)
    assert after.contents[0][1] != before.contents[0][1]
    assert after.contents[0][0] != before.contents[0][0], "requests in flight still read the old slot"
    assert after.windows[0].digest != before.windows[0].digest
    admission.registry.remove("kind")  # type: ignore[attr-defined]
    with pytest.raises(errors.UnknownDirection):
        admission.resolve("id", spec, 3)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry_shapes, "_MOST_ENTRIES", 3)
    admission = make_admission()
    for number in range(1, 9):
        entry = Steering("kind", 1.0, span=f"generated[{number}:]")
        for entries in (1, 2, 3):
            admission.resolve("id", RequestSpec((entry,) * entries), 3)
            remembered = admission._shapes._remembered[1].values()
            assert sum(len(one.entries) for one in remembered) <= 3 or len(remembered) == 1


def test_a_condition_over_the_prompt_takes_one_place_for_all_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entry_shapes, "_MOST_ENTRIES", 3)
    admission = make_admission()
    admission.resolve("id", RequestSpec((Steering("kind", 1.0),)), 3)
    over_prompt = Steering("kind", 1.0, span="generated", when=When("kind", above=0.5, over="prompt"))
    for prompt_len in range(1, 9):
        admission.resolve("id", RequestSpec((over_prompt,)), prompt_len)
    assert len(admission._shapes._remembered[1]) == 2


def test_ten_thousand_different_entries_in_flight_are_remembered() -> None:
    admission = make_admission()
    for number in range(10_000):
        admission.resolve("id", RequestSpec((Steering("kind", 1.0, span=f"generated[{number}:]"),)), 3)
    assert len(admission._shapes._remembered[1]) == 10_000


def test_a_refused_request_leaves_nothing_that_refuses_the_next() -> None:
    admission = make_admission()
    for alpha in (10.5, -11.0):
        with pytest.raises(errors.BadAlpha, match=f"alpha is {alpha:g} at layer 1"):
            admission.resolve("id", RequestSpec((Steering("kind", alpha),)), 3)
    assert admission.resolve("id", RequestSpec((Steering("kind", 9.5),)), 3).windows[0].entries[0].a == 9.5
    with pytest.raises(errors.BadAlpha, match=r"alpha is 10[.]5 at layer 1"):
        admission.resolve("id", RequestSpec((Steering("kind", 10.5),)), 3)
