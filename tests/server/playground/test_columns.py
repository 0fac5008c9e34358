"""Columns: what they ask for, what they show, and how they are added, changed and removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.server.fake_steering_server import ALIAS, FakeSteeringServer, alpha_of
from tests.support.server.playground_visit import Visit
from vllm_steer import Steering

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

COMMON = {"direction": "kind", "layer": 2, "span": "response"}
READOUT = {"layers": [2], "span": "generated", "project": ["kind"], "trace": ["kind"]}


def steerings(fake: FakeSteeringServer) -> list[list[dict[str, Any]]]:
    """The steering of each request, unsteered first, each entry checked as the server would."""
    found = sorted((request["steering"] for request in fake.requests), key=str)
    for steering in found:
        for entry in steering:
            Steering.from_json(entry)
    return sorted(found, key=len)


def test_an_unsteered_and_a_steered_answer_stream_side_by_side(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    # a fifth of the layer's norm is where the page starts when the server tells the norm
    assert steerings(fake) == [[], [{**COMMON, "alpha": 8}]]
    for index, alpha in enumerate((0, 8)):
        assert visit.text(index) == "".join(fake.words(alpha))
    plain, steered = ({**request, "steering": None} for request in fake.requests)
    assert plain == steered
    assert plain["model"] == "fake"
    assert plain["readout"] == READOUT


@pytest.mark.parametrize(
    ("chosen", "entry"),
    [
        ("add α·d", {"alpha": 8}),
        ("set the projection to α", {"alpha": 8, "op": "set"}),
        ("scale the projection by α", {"alpha": 2, "op": "scale"}),
        ("ablate: remove α times the component", {"alpha": 1, "op": "ablate"}),
        ("clamp the projection, low to high", {"low": 8, "op": "clamp"}),
    ],
)
def test_each_operation_is_asked_for_with_a_number_that_fits_it(
    visit: Visit, fake: FakeSteeringServer, chosen: str, entry: dict[str, Any]
) -> None:
    visit.page.get_by_label("Operation").select_option(label=chosen)
    visit.run()
    assert steerings(fake) == [[], [COMMON | entry]]


def test_a_clamp_has_two_bounds_of_which_one_is_enough(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Operation").select_option("clamp")
    visit.type_number(1, "-3", "low")
    visit.type_number(1, "5", "high")
    visit.run()
    assert steerings(fake)[1] == [{**COMMON, "op": "clamp", "low": -3, "high": 5}]
    assert visit.names() == ["unsteered", "low = −3, high = +5"]
    fake.requests.clear()
    visit.type_number(1, "", "low")
    visit.settle("^unsteered|^high")
    assert steerings(fake)[-1] == [{**COMMON, "op": "clamp", "high": 5}]
    visit.number(1, "low").fill("6")
    visit.run()
    visit.page.locator("#status", has_text="low is 6 and high 5").wait_for()


@pytest.mark.parametrize(
    ("chosen", "typed", "span"),
    [
        ("all", None, "all"),
        ("prompt", None, "prompt"),
        ("slices", "prompt[-5:] + response[:8]", "prompt[-5:] + response[:8]"),
    ],
)
def test_the_steered_tokens_are_a_span_or_slices_of_them(
    visit: Visit, fake: FakeSteeringServer, chosen: str, typed: str | None, span: str
) -> None:
    visit.page.get_by_label("Steered tokens").select_option(chosen)
    if typed:
        visit.page.get_by_role("textbox", name="Slices").fill(typed)
    visit.run()
    assert steerings(fake)[1] == [{**COMMON, "alpha": 8, "span": span}]


def test_slices_that_are_none_are_refused_with_what_is_allowed(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Steered tokens").select_option("slices")
    visit.page.get_by_role("textbox", name="Slices").fill("answer[::2]")
    visit.button("Run").click()
    visit.page.locator("#status", has_text="Allowed: prompt, generated, response, all, slices").wait_for()
    assert fake.requests == []


def test_several_directions_act_together_and_the_first_one_varies(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.button("Add a direction").click()
    second = visit.entry(1)
    second.get_by_label("Direction").select_option("wry")
    second.get_by_label("Operation").select_option("set")
    second.get_by_label("α", exact=True).fill("-4")
    visit.add("another number")
    visit.run()
    wry = {"direction": "wry", "layer": 1, "alpha": -4, "op": "set", "span": "response"}
    assert steerings(fake) == [[], *([{**COMMON, "alpha": alpha}, wry] for alpha in (-8, 8))]
    fake.requests.clear()
    visit.button("Remove direction 2").click()
    visit.run()
    assert steerings(fake) == [[], *([{**COMMON, "alpha": alpha}] for alpha in (-8, 8))]


def test_every_added_column_has_a_number_of_its_own_within_the_bounds(
    browser: Browser, fake: FakeSteeringServer
) -> None:
    fake.max_norms = 0.25  # 10 at most
    visit = Visit(browser, fake.url)
    for _ in range(12):
        visit.add("another number")
    numbers = [float(visit.number(index).input_value()) for index in range(1, 14)]
    assert len(set(numbers)) == 13
    assert max(map(abs, numbers)) <= 10
    assert numbers[:3] == [8, -8, 4]
    visit.close()


def test_an_alias_is_a_column_that_brings_its_own_steering(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.add(ALIAS)
    visit.run()
    (asked,) = (request for request in fake.requests if request["model"] == ALIAS)
    assert "steering" not in asked
    assert asked["readout"] == READOUT
    assert visit.names()[2] == f"alias {ALIAS}"
    assert visit.text(2) == "".join(fake.words(30))


def test_a_control_adds_another_direction_of_the_same_length(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.add("long")  # four times as long, so a quarter of α
    visit.run()
    assert [{**COMMON, "direction": "long", "alpha": 2}] in steerings(fake)
    assert visit.names()[2] == "control long, α = +2"
    assert all(request["readout"] == READOUT for request in fake.requests)  # measured along the same direction


def test_samples_have_seeds_and_values_of_their_own(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Samples").fill("3")
    visit.page.get_by_label("Seed", exact=True).fill("5")
    visit.run()
    assert {(request["n"], request["seed"]) for request in fake.requests} == {(3, 5)}
    headings = visit.column(1).locator("h3").all_text_contents()
    assert headings == ["Sample 1, seed 5", "Sample 2, seed 6", "Sample 3, seed 7"]
    firsts = [
        visit.column(1).locator(".output").nth(sample).locator("span").first.get_attribute("data-value")
        for sample in range(3)
    ]
    assert firsts == ["8.00", "9.00", "10.0"]
    fake.requests.clear()
    visit.page.get_by_label("Temperature").fill("0")
    visit.run()
    assert all("n" not in request for request in fake.requests)  # vLLM refuses samples that are all the same
    assert visit.column(1).locator(".output").count() == 1


def test_the_status_is_short_where_there_are_more_than_two_answers(visit: Visit) -> None:
    visit.page.get_by_label("Samples").fill("3")
    visit.run()
    assert visit.status() == "Both columns are complete, with 3 samples each."
    visit.page.get_by_label("Samples").fill("1")
    visit.add("another number")
    visit.run()
    assert visit.status() == "All 3 columns are complete."


def test_one_token_is_not_called_tokens(visit: Visit, fake: FakeSteeringServer) -> None:
    fake.tokens = 2  # of which one has a value
    visit.page.get_by_label("Max tokens").fill("1")
    visit.page.get_by_label("Max tokens").press("Tab")
    visit.run()
    assert ", 1 token, no stop" in str(visit.page.locator("#more-told").text_content())
    assert "over 1 token," in visit.status()
    assert "1 tokens" not in str(visit.page.locator("main").text_content())


def test_a_control_says_that_it_acts_at_another_layer_than_its_own(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.add("wry")
    assert visit.names()[2] == "control wry at layer 2, α = +8"
    told = visit.column(2).locator(".told").text_content()
    assert told == "wry is a direction of layer 1; here it acts at layer 2."
    visit.run()
    assert [{**COMMON, "direction": "wry", "alpha": 8}] in steerings(fake)
    visit.entry(0).get_by_label("Layer").select_option("1")
    assert visit.names()[2] == "control wry, α = +8"
    assert visit.column(2).locator(".told").is_hidden()


def test_no_two_columns_look_the_same_and_there_are_no_more_than_that(visit: Visit, fake: FakeSteeringServer) -> None:
    fake.tokens = 3
    most = int(visit.page.evaluate("MOST_COLUMNS"))
    assert most >= 12
    for _ in range(most - 2):
        visit.add("another number")
    visit.add("another number")
    assert visit.status() == f"There are {most} columns, the most that the chart can tell apart. Remove one first."
    assert len(visit.names()) == most
    visit.run()
    looks = """(lines) => lines.map((line) => {
        const { stroke, strokeDasharray } = getComputedStyle(line);
        return `${stroke} ${strokeDasharray}`;
    })"""
    lines = visit.page.locator("#chart-svg .line").evaluate_all(looks)
    assert len(set(lines)) == len(lines) == most
    assert visit.page.locator("#chart-legend .line").evaluate_all(looks) == lines
    edges = visit.page.locator(".column").evaluate_all(
        "(all) => all.map((one) => `${getComputedStyle(one).borderTopColor} ${getComputedStyle(one).borderTopStyle}`)"
    )
    assert len(set(edges)) == most


def test_a_single_value_is_a_piece_of_its_line(visit: Visit, fake: FakeSteeringServer) -> None:
    fake.tokens = 2
    visit.run()
    widths = visit.page.locator("#chart-svg .line").evaluate_all("(lines) => lines.map((line) => line.getBBox().width)")
    assert widths == [34, 34]  # as in the legend


def test_a_dragged_alpha_runs_that_column_alone_again(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    fake.requests.clear()
    visit.column(1).get_by_role("slider").focus()
    visit.page.keyboard.press("Home")
    visit.settle("^α = −40: 12 tokens")
    assert [alpha_of(request) for request in fake.requests] == [-40]
    assert "cold" in visit.text(1)
    # another setting than α concerns all columns
    fake.requests.clear()
    visit.page.get_by_label("Seed", exact=True).fill("7")
    visit.type_number(1, "3")
    visit.settle(r"α = \+3: 12 tokens")
    assert sorted((request["seed"], alpha_of(request)) for request in fake.requests) == [(7, 0), (7, 3)]


def test_a_removed_column_is_gone(visit: Visit) -> None:
    visit.add("another number")
    visit.column(0).get_by_role("button", name="Remove").click()
    assert visit.names() == ["α = +8", "α = −8"]


def test_stop_ends_the_streams_at_the_server_too(visit: Visit, fake: FakeSteeringServer) -> None:
    fake.tokens, fake.seconds_per_token = 400, 0.02
    visit.button("Run").click()
    visit.page.locator(".output span").nth(3).wait_for()
    visit.button("Stop").click()
    visit.settle()
    assert visit.status() == "Stopped."
    assert len(visit.text(0)) < len("".join(fake.words(0)))
    visit.page.wait_for_timeout(300)  # until the fake has written into the closed connections
    assert fake.abandoned == 2


def test_a_refusal_is_shown_in_its_column_and_the_other_goes_on(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.expected.append("400")
    visit.number(1).fill("900")
    visit.run()
    assert visit.column(1).locator(".error").text_content() == "alpha is 900.0; use a smaller one"
    assert visit.text(0) == "".join(fake.words(0))
    assert visit.status().startswith("1 of 2 failed: alpha is 900")
