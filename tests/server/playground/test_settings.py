"""The settings that all columns share: the unit of α, stops, the conversation, links and the code for other clients."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest

from tests.support.server.fake_steering_server import FakeSteeringServer, alpha_of
from tests.support.server.playground_visit import Visit
from vllm_steer.schema.readout import Readout

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


def last_messages(fake: FakeSteeringServer) -> dict[float, list[tuple[str, str]]]:
    """(role, content) of the messages of each request, by its α."""
    return {
        alpha_of(one): [(message["role"], message["content"]) for message in one["messages"]] for one in fake.requests
    }


def test_alpha_can_be_typed_in_residual_norms(browser: Browser, fake: FakeSteeringServer) -> None:
    fake.max_norms = 2
    visit = Visit(browser, fake.url)
    bounds = visit.entry(0).locator(".allowed")
    assert str(bounds.text_content()).startswith("Allowed α: −80 to 80 (2 residual norms of layer 2")
    visit.page.get_by_label("Unit of α").select_option("norms")
    assert str(bounds.text_content()).startswith("Allowed α: −2 to 2 norms")
    assert visit.page.locator("#unit-told").text_content() == "A norm of layer 2 is 40."
    assert visit.number(1).input_value() == "0.2"
    visit.type_number(1, "-0.5")
    assert visit.names()[1] == "α = −20 (−0.5 norms)"
    visit.run()
    assert sorted(map(alpha_of, fake.requests)) == [-20, 0]
    visit.type_number(1, "2.5")
    assert "2.5 is not allowed. Allowed: −2 to 2 norms" in str(visit.column(1).locator(".mistake").text_content())
    # a direction four times as long needs a quarter of α for the same norms
    visit.entry(0).get_by_label("Direction").select_option("long")
    visit.type_number(1, "0.5")
    visit.settle(r"α = \+5 \(0.5 norms\)")
    visit.close()


def test_without_norms_and_bounds_the_page_says_that_there_are_none(browser: Browser, fake: FakeSteeringServer) -> None:
    fake.norms, fake.max_alpha = False, None
    visit = Visit(browser, fake.url)
    assert "does not know" in str(visit.page.locator("#unit-told").text_content())
    assert visit.page.locator("[name=unit] option[value=norms]").is_disabled()
    assert visit.entry(0).locator(".allowed").text_content() == "Allowed α: any number (the server sets no bound)."
    visit.close()


def test_an_operation_for_unit_vectors_is_refused_for_others(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.entry(0).get_by_label("Direction").select_option("long")
    visit.page.get_by_label("Operation").select_option("ablate")
    visit.button("Run").click()
    visit.page.locator("#status", has_text="long is not of length 1").wait_for()
    assert fake.requests == []


def test_a_stop_is_asked_for_where_one_is_chosen(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Stop by").select_option("wry")
    visit.button("Run").click()
    visit.page.locator("#status", has_text="Bound: ").wait_for()  # it is required now
    visit.page.get_by_label("when it is").select_option("below")
    visit.page.get_by_label("Bound").fill("-2.5")
    visit.page.get_by_label("Tokens in a row").fill("3")
    visit.run()
    readouts = [request["readout"] for request in fake.requests]
    assert [readout["stop"] for readout in readouts] == [
        {"direction": "wry", "below": -2.5, "patience": 3, "layer": 1}
    ] * 2
    Readout.from_json(readouts[0])


def test_a_system_prompt_comes_before_every_conversation(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_text("System prompt").first.click()
    visit.page.get_by_role("textbox", name="System prompt").fill("Be brief.")
    visit.page.get_by_label("Prompt", exact=True).fill("Hi")
    visit.run()
    assert list(last_messages(fake).values()) == [[("system", "Be brief."), ("user", "Hi")]] * 2
    fake.requests.clear()
    visit.page.get_by_label("Prompt is").select_option("text")
    visit.run()
    assert [request["prompt"] for request in fake.requests] == ["Hi", "Hi"]


def test_in_the_next_turn_each_column_goes_on_with_its_own_answer(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill("One")
    assert visit.button("Next turn").is_disabled()
    visit.run()
    visit.button("Next turn").click()
    assert visit.page.evaluate("document.activeElement.name") == "prompt"
    fake.requests.clear()
    visit.page.keyboard.type("Two")
    visit.page.keyboard.press("Control+Enter")
    visit.settle("unsteered: 12 tokens")
    own = {alpha: [("user", "One"), ("assistant", "".join(fake.words(alpha))), ("user", "Two")] for alpha in (0.0, 8.0)}
    assert last_messages(fake) == own
    assert "2 earlier messages" in str(visit.column(1).locator(".history summary").text_content())
    # a repeated run repeats this turn alone
    fake.requests.clear()
    visit.run()
    assert last_messages(fake) == own
    fake.requests.clear()
    visit.button("New conversation").click()
    visit.page.get_by_label("Prompt", exact=True).fill("Three")
    visit.run()
    assert list(last_messages(fake).values()) == [[("user", "Three")]] * 2


def test_a_message_that_is_written_before_next_turn_is_the_next_message(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill("One")
    visit.run()
    visit.page.get_by_label("Prompt", exact=True).fill("Two")
    assert "“Next turn” keeps them" in str(visit.page.locator("#stale").text_content())
    visit.button("Next turn").click()
    assert visit.page.get_by_label("Prompt", exact=True).input_value() == "Two"
    assert "“Run” sends it" in visit.status()
    turn = visit.page.locator("#turn")
    assert str(turn.text_content()).startswith("Turn 2: “Run” sends the prompt as the next message.")
    fake.requests.clear()
    visit.run()
    assert [messages[-1] for messages in last_messages(fake).values()] == [("user", "Two")] * 2
    assert [len(messages) for messages in last_messages(fake).values()] == [3, 3]
    assert str(turn.text_content()).startswith("Turn 2: “Run” answers the prompt again, still in this turn.")


def test_no_code_is_given_for_what_cannot_be_sent(visit: Visit) -> None:
    buttons = [visit.column(1).get_by_role("button", name=name) for name in ("curl", "Python")]
    visit.run()
    assert all(button.is_enabled() for button in buttons)
    visit.button("Next turn").click()  # the next message is still to be written
    assert all(button.is_disabled() for button in buttons)
    assert {button.get_attribute("title") for button in buttons} == {"Write a prompt first."}
    visit.page.get_by_label("Prompt", exact=True).fill("And then?")
    assert all(button.is_enabled() for button in buttons)
    visit.page.get_by_label("Temperature").fill("")
    assert all(button.is_disabled() for button in buttons)
    visit.page.get_by_label("Temperature").fill("1")
    visit.number(1).fill("9999")
    assert all(button.is_disabled() for button in buttons)
    assert visit.column(0).get_by_role("button", name="curl").is_enabled()


def test_the_code_is_shown_from_its_begin(visit: Visit) -> None:
    visit.column(1).get_by_role("button", name="curl").click()
    text = visit.page.locator("#code-text")
    height, visible = (int(text.evaluate(f"(area) => area.{name}")) for name in ("scrollHeight", "clientHeight"))
    assert height > visible  # else there would be nothing to scroll
    assert text.evaluate("(area) => area.scrollTop") == 0


def test_all_columns_can_go_on_from_one_answer(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill("One")
    visit.page.get_by_label("Samples").fill("2")
    visit.run()
    visit.column(1).get_by_role("button", name="Continue all from this answer, sample 2").click()
    visit.add("another number")  # a new column goes on from the same
    fake.requests.clear()
    visit.page.get_by_label("Prompt", exact=True).fill("Two")
    visit.run()
    common = [("user", "One"), ("assistant", "".join(fake.words(8))), ("user", "Two")]
    assert last_messages(fake) == dict.fromkeys((0.0, 8.0, -8.0), common)


def test_a_column_without_an_answer_is_named_before_the_next_turn(visit: Visit) -> None:
    visit.run()
    visit.add("another number")
    assert visit.button("Next turn").is_disabled()
    visit.column(0).get_by_role("button", name="Continue all").click()
    visit.page.locator("#status", has_text="All columns go on").wait_for()


def test_a_link_brings_the_settings_back_and_holds_no_key(browser: Browser, fake: FakeSteeringServer) -> None:
    fake.api_key = "sk-very-secret"
    first = Visit(browser, fake.url, key="sk-very-secret")
    page = first.page
    page.get_by_label("Prompt", exact=True).fill("Ça va? #1 & 2")
    page.get_by_text("System prompt").first.click()
    page.get_by_role("textbox", name="System prompt").fill("Kurz.")
    first.entry(0).get_by_label("Direction").select_option("wry")
    page.get_by_label("Steered tokens").select_option("slices")
    page.get_by_role("textbox", name="Slices").fill("response[:8]")
    first.button("Add a direction").click()
    first.entry(1).get_by_role("spinbutton").fill("3")
    page.get_by_label("Samples").fill("2")
    page.get_by_label("Stop by").select_option("wry")
    page.get_by_label("Bound").fill("9")
    page.get_by_label("Unit of α").select_option("norms")
    first.add("fake-kind")
    first.add("long")
    first.type_number(1, "-0.25")
    first.run()
    asked = sorted(fake.requests, key=str)
    fake.requests.clear()
    assert "secret" not in page.url
    assert all("secret" not in url for url in first.requests)
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    second = Visit(browser, fake.url, key="sk-very-secret", fragment=first.fragment())
    assert second.names() == first.names()
    assert second.names()[1] == "α = −10 (−0.25 norms)"
    second.run()
    assert sorted(fake.requests, key=str) == asked
    for visit in (first, second):
        visit.close()


def test_a_short_link_names_numbers_alone(browser: Browser, fake: FakeSteeringServer) -> None:
    visit = Visit(browser, fake.url, fragment="#alphas=-20,0,8&temperature=0")
    assert visit.names() == ["α = −20", "unsteered", "α = +8"]
    assert visit.status() == ""
    visit.close()


def test_the_page_says_that_a_copied_link_holds_the_prompt(browser: Browser, fake: FakeSteeringServer) -> None:
    visit = Visit(browser, fake.url, permissions=["clipboard-read", "clipboard-write"])
    visit.page.get_by_label("Prompt", exact=True).fill("My own words")
    visit.run()
    visit.button("Copy link").click()
    visit.page.locator("#status", has_text="the text in “Prompt” and “System prompt”").wait_for()
    link = str(visit.page.evaluate("navigator.clipboard.readText()"))
    assert parse_qs(link.partition("#")[2])["prompt"] == ["My own words"]
    assert "warm" not in link  # a word of the answer
    visit.close()


def test_an_emptied_prompt_stays_empty_in_the_link(visit: Visit, browser: Browser, fake: FakeSteeringServer) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill("")
    visit.page.keyboard.press("Tab")
    again = Visit(browser, fake.url, fragment=visit.fragment())
    assert again.page.get_by_label("Prompt", exact=True).input_value() == ""
    again.close()


@pytest.mark.parametrize("mode", ["chat", "text"])
def test_the_code_it_gives_asks_for_the_same(visit: Visit, fake: FakeSteeringServer, mode: str) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill('It\'s "quoted" \\ and\nnew')
    visit.page.get_by_label("Prompt is").select_option(mode)
    visit.page.get_by_label("Samples").fill("2")
    visit.run()
    asked = next(request for request in fake.requests if alpha_of(request) == 8)
    for name in ("path", "stream", "return_token_ids"):
        asked.pop(name)
    visit.column(1).get_by_role("button", name="Python").click()
    source = visit.page.locator("#code-text").input_value()
    given: dict[str, Any] = {}

    class Recorder:
        """Takes the place of the openai client that the code makes."""

        def __init__(self, **_: Any) -> None:
            self.chat = self
            self.completions = self

        def create(self, *, extra_body: dict[str, Any], **fields: Any) -> None:
            given.update(fields, **extra_body)
            raise StopIteration

    with pytest.raises(StopIteration):
        exec(source.replace("from openai import OpenAI", ""), {"OpenAI": Recorder})
    assert given == asked
    visit.button("Close").click()
    visit.column(1).get_by_role("button", name="curl").click()
    assert json.loads(shlex.split(visit.page.locator("#code-text").input_value())[-1]) == asked
