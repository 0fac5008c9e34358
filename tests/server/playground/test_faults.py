"""What the page says where something is wrong: a dead server, a missing key, a wrong number, a link to nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from tests.support.server.fake_steering_server import FakeSteeringServer
from tests.support.server.playground_visit import GUARDED, Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


BROKE = "The connection broke before the reply was complete"


@pytest.mark.parametrize(
    ("death", "said"), [("closes", BROKE), ("resets", BROKE), ("ends", "The server ended the reply before it was")]
)
def test_a_server_that_dies_while_it_answers_ends_the_run(
    visit: Visit, fake: FakeSteeringServer, death: str, said: str
) -> None:
    visit.expected += ["ERR_", "Failed to load"]
    fake.death = death
    fake.seconds_per_token = 0.05
    visit.run()
    for index in (0, 1):
        assert said in str(visit.column(index).locator(".error").text_content())
        # what came before is still there, but for what the browser had not read yet
        assert len(visit.text(index)) > 3
        assert "".join(fake.words((0, 8)[index])[:3]).startswith(visit.text(index))
    assert visit.status().startswith(f"2 of 2 failed: {said}")
    assert visit.button("Stop").is_disabled()
    fake.death = ""
    visit.run()
    assert visit.text(1) == "".join(fake.words(8))


def test_a_server_that_falls_silent_is_asked_and_given_up(browser: Browser, fake: FakeSteeringServer) -> None:
    visit = Visit(browser, fake.url, path=GUARDED, clock=True)
    visit.expected.append("ERR_")
    fake.death = "freezes"
    visit.button("Run").click()
    visit.page.locator(".output span").nth(2).wait_for()
    for _ in range(2):  # ten seconds of silence, then five without an answer
        visit.page.clock.run_for(10_000)
    visit.settle("failed")
    assert visit.status().startswith("2 of 2 failed: The server has stopped answering")
    visit.close()


def test_a_server_that_is_only_slow_is_waited_for(browser: Browser, fake: FakeSteeringServer) -> None:
    visit = Visit(browser, fake.url, path=GUARDED, clock=True)
    fake.tokens, fake.seconds_per_token = 5, 0.3
    visit.button("Run").click()
    visit.page.locator(".output span").first.wait_for()
    with visit.page.expect_request("**/v1/steering"):
        visit.page.clock.run_for(11_000)
    visit.page.clock.resume()
    visit.settle("unsteered: 5 tokens")
    visit.close()


def test_a_server_that_is_gone_before_the_run_is_said_to_be(visit: Visit) -> None:
    visit.expected.append("ERR_")
    visit.page.route("**/v1/steering", lambda route: route.abort())
    visit.run()
    assert "cannot be reached" in visit.status()
    assert "cannot be reached" in str(visit.column(0).locator(".error").text_content())


@pytest.mark.parametrize("way", ["Escape", "Not now"])
def test_the_key_dialog_can_be_left_and_opened_again(browser: Browser, fake: FakeSteeringServer, way: str) -> None:
    fake.api_key = "sk"
    visit = Visit(browser, fake.url, waits=False)
    visit.expected.append("401")
    visit.page.locator("dialog#key").wait_for()
    if way == "Escape":
        visit.page.keyboard.press("Escape")
    else:
        visit.button(way).click()
    visit.page.locator("#about", has_text="Give it with the button “API key”").wait_for()
    assert visit.page.evaluate("document.activeElement.id") == "ask-key"
    visit.page.keyboard.press("Enter")
    visit.page.get_by_label("Key", exact=True).fill("sk")
    visit.page.keyboard.press("Enter")
    visit.column(1).wait_for()
    visit.run()
    visit.close()


def test_a_wrong_key_is_refused_and_asked_for_again(browser: Browser, fake: FakeSteeringServer) -> None:
    fake.api_key = "sk"
    visit = Visit(browser, fake.url, key="wrong", waits=False)
    visit.page.get_by_text("The server refused that API key").wait_for()
    visit.page.get_by_label("Key", exact=True).fill("sk")
    visit.page.keyboard.press("Enter")
    visit.column(1).wait_for()
    visit.close()


@pytest.mark.parametrize(
    ("operation", "typed", "allowed"),
    [
        ("add", "1200", "1200 is not allowed. Allowed: −160 to 160 (4 residual norms of layer 2"),
        ("ablate", "0", "0 is not allowed. Allowed: above 0 to 2"),
        ("scale", "7", "7 is not allowed. Allowed: −3 to 5"),
        ("add", "", "No number. Allowed: −160 to 160"),
    ],
)
def test_a_number_out_of_range_stays_and_says_what_is_allowed(
    browser: Browser, fake: FakeSteeringServer, operation: str, typed: str, allowed: str
) -> None:
    fake.max_norms = 4
    visit = Visit(browser, fake.url)
    visit.page.get_by_label("Operation").select_option(operation)
    visit.type_number(1, typed)
    assert visit.number(1).input_value() == typed
    assert allowed in str(visit.column(1).locator(".mistake").first.text_content())
    assert visit.number(1).get_attribute("aria-invalid") == "true"
    visit.page.get_by_label("Max tokens").fill("7")  # another change must not bring the old number back
    visit.page.get_by_label("Max tokens").press("Tab")
    assert visit.number(1).input_value() == typed
    visit.run()
    visit.page.locator("#status", has_text=f"did not run: {allowed}").wait_for()
    assert [request["steering"] for request in fake.requests] == [[]]  # the unsteered column has no wrong number
    assert visit.number(1).evaluate("(field) => field === document.activeElement")
    assert visit.column(1).locator(".error").text_content() == "This column did not run."
    assert visit.button("Next turn").is_disabled()
    visit.type_number(1, "1.5")
    visit.settle(r"1\.5: 12 tokens")  # as every column whose number changes after a run
    assert visit.column(1).locator(".mistake:visible").count() == 0
    visit.close()


MISSING = [
    ({"direction": "knid"}, 'no direction "knid"', "fieldset.entry .direction"),
    ({"direction": "kind", "layer": "7"}, 'no hooked layer "7"', "fieldset.entry .layer"),
    ({"measured": "knid"}, 'no direction "knid"', "[name=measured]"),
    ({"also": [{"direction": "knid", "op": "add", "alpha": 1}]}, 'no direction "knid"', "fieldset.entry >> nth=1"),
]


@pytest.mark.parametrize(("link", "said", "field"), MISSING, ids=["direction", "layer", "measured", "second"])
def test_a_link_to_what_the_server_lacks_says_so_and_shows_nothing_else(
    browser: Browser, fake: FakeSteeringServer, link: dict[str, Any], said: str, field: str
) -> None:
    fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in link.items()}
    visit = Visit(browser, fake.url, fragment=f"#{urlencode(fields)}")
    assert said in visit.status()
    select = visit.page.locator(field)
    if "nth" in field:
        select = select.locator(".direction")
    assert "(missing)" in str(select.evaluate("(one) => one.selectedOptions[0].textContent"))
    visit.button("Run").click()
    visit.page.locator("#status", has_text=said).wait_for()
    assert fake.requests == []
    select.select_option(index=1)
    visit.run()
    assert fake.requests
    visit.close()


@pytest.mark.parametrize(
    "spec", [{"kind": "alias", "alias": "gone"}, {"kind": "steered", "direction": "gone", "alpha": 1}]
)
def test_a_column_of_a_link_that_the_server_lacks_says_so(
    browser: Browser, fake: FakeSteeringServer, spec: dict[str, Any]
) -> None:
    visit = Visit(browser, fake.url, fragment=f"#{urlencode({'columns': json.dumps([{'kind': 'plain'}, spec])})}")
    assert '"gone"' in visit.status()
    visit.run()
    visit.page.locator("#status", has_text="Remove the column").wait_for()
    assert [request["steering"] for request in fake.requests] == [[]]
    visit.column(1).get_by_role("button", name="Remove").click()
    visit.run()
    assert len(fake.requests) == 2
    visit.close()


def test_a_wrong_pair_of_bounds_is_said_in_its_column_and_the_others_run(
    visit: Visit, fake: FakeSteeringServer
) -> None:
    visit.page.get_by_label("Operation").select_option("clamp")
    visit.run()
    visit.type_number(1, "5", "high")
    visit.number(1, "low").fill("6")
    fake.requests.clear()
    visit.run()
    told = str(visit.column(1).locator(".error").text_content())
    assert told == "This column did not run. low is 6 and high 5; allowed: low up to high."
    assert visit.column(1).locator(".output").count() == 0
    assert [request["steering"] for request in fake.requests] == [[]]


def a_link(browser: Browser, fake: FakeSteeringServer) -> str:
    """The link of a page with three columns and another number of tokens."""
    visit = Visit(browser, fake.url)
    visit.add("another number")
    visit.page.get_by_label("Max tokens").fill("7")
    visit.page.keyboard.press("Tab")
    link = visit.fragment()
    visit.close()
    return link


def test_a_link_that_lost_its_end_says_so_and_shows_no_other_columns(
    browser: Browser, fake: FakeSteeringServer
) -> None:
    link = a_link(browser, fake)
    visit = Visit(browser, fake.url, fragment=link[:-30], waits=False)
    visit.settle("It was cut short, at “columns”")
    assert "none of its columns are shown" in visit.status()
    assert visit.names() == []
    assert visit.page.get_by_label("Max tokens").input_value() == "7"
    visit.close()
    whole = Visit(browser, fake.url, fragment=link)
    assert (whole.status(), len(whole.names())) == ("", 3)
    whole.close()


def test_no_cut_of_a_link_is_silent(browser: Browser, fake: FakeSteeringServer) -> None:
    link = a_link(browser, fake)
    visit = Visit(browser, fake.url)
    lengths = range(len("#v=1&"), len(link))
    silent = visit.page.evaluate(
        "(links) => links.filter((link) => fromFragment(link).unread.length === 0)", [link[:end] for end in lengths]
    )
    assert silent == []
    assert visit.page.evaluate("(link) => fromFragment(link).unread", link) == []
    visit.close()


@pytest.mark.parametrize(
    ("link", "said", "field", "shown"),
    [
        ("op=addd", 'This page has no operation "addd"', ".op", "addd"),
        ("temperature=abc", "temperature is “abc”, which is no number", "[name=temperature]", ""),
        ("n=0x3", "n is “0x3”, which is no number", "[name=n]", ""),
        ("mode=chatt", '“Prompt is” has no choice "chatt"', "[name=mode]", "chatt"),
        ("unit=metres", '“Unit of α” has no choice "metres"', "[name=unit]", "metres"),
        ("stop_side=beside", '“when it is” has no choice "beside"', "[name=stop_side]", "beside"),
        ("span=answr", "Allowed: prompt, generated, response, all", ".slices", "answr"),
    ],
)
def test_what_a_link_says_wrongly_is_named_and_nothing_runs_in_its_place(
    browser: Browser, fake: FakeSteeringServer, link: str, said: str, field: str, shown: str
) -> None:
    visit = Visit(browser, fake.url, fragment=f"#{link}")
    assert said in visit.status()
    assert visit.page.locator(f"#settings {field}").input_value() == shown
    visit.button("Run").click()
    visit.page.wait_for_function("document.querySelector('#settings :is(input, select):invalid')")
    assert fake.requests == []
    visit.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"columns": '[{"kind":"plain"},{"kind":"steerd","alpha":1}]'}, "no column in place 2"),
        ({"columns": '[{"kind":"plain"},{"kind":"steered","alpha":"1"}]'}, "no column in place 2"),
        ({"columns": '[{"kind":"plain"},{"kind":"steered","alpha":1,"directoin":"wry"}]'}, "no column in place 2"),
        ({"alphas": "0,x"}, "alphas has “x”, which is no number"),
        ({"also": '[{"direction":"wry","alpha":"1"}]', "alphas": "0"}, "no direction in place 1"),
        ({"tempreature": "1", "alphas": "0"}, "“tempreature” is none of the names that a link may have"),
    ],
)
def test_what_a_link_says_of_columns_and_directions_is_left_out_aloud(
    browser: Browser, fake: FakeSteeringServer, fields: dict[str, str], said: str
) -> None:
    visit = Visit(browser, fake.url, fragment=f"#{urlencode(fields)}")
    assert said in visit.status()
    assert visit.names() == ["unsteered"]
    assert visit.page.locator("fieldset.entry").count() == 1
    visit.close()
