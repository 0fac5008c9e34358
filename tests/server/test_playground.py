"""The playground in a real browser: headless Chromium against a fake server, and once against the real one."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.browser import DESKTOP, PHONE, chromium, playwright
from tests.server.conftest import API_KEY, ServedModel
from tests.support.server.fake_steering_server import FakeSteeringServer, fake_steering_server
from vllm_steer import Steering
from vllm_steer.server.playground.page import PATHS, playground_page, playground_router

pytestmark = pytest.mark.slow

OPEN, GUARDED = PATHS[1], PATHS[0]
SETTLED_MS = 10_000


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def fake() -> Iterator[FakeSteeringServer]:
    with fake_steering_server() as server:
        yield server


class Visit:
    """An open playground, with the page's complaints and requests."""

    def __init__(
        self,
        browser: playwright.Browser,
        url: str,
        *,
        path: str = GUARDED,
        fragment: str = "",
        viewport: dict[str, int] = DESKTOP,
        scheme: str = "light",
    ) -> None:
        self.server = url
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SETTLED_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{url}{path}{fragment}")

    def column(self, index: int) -> playwright.Locator:
        return self.page.locator(".column").nth(index)

    def text(self, index: int) -> str:
        return str(self.column(index).locator(".output").text_content())

    def run(self) -> None:
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.settle()

    def settle(self) -> None:
        self.page.locator("#status", has_text=re.compile(r"tokens|failed|Stopped")).wait_for()

    def close(self) -> None:
        """The page must have been silent and must have spoken to its own server only."""
        self.context.close()
        assert self.complaints == []
        assert all(url.startswith((self.server, "data:")) for url in self.requests), self.requests


@pytest.fixture
def visit(browser: playwright.Browser, fake: FakeSteeringServer) -> Iterator[Visit]:
    visit = Visit(browser, fake.url)
    visit.column(1).wait_for()
    yield visit
    visit.close()


def test_two_alphas_stream_side_by_side_from_one_seed(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    # a fifth of the layer's norm is where the page starts when the server tells the norm
    assert [request["steering"][0]["alpha"] for request in sorted(fake.requests, key=str)] == [0, 8]
    for index, alpha in enumerate((0, 8)):
        assert visit.text(index) == "".join(fake.words(alpha))
    plain, steered = ({**request, "steering": None} for request in fake.requests)
    assert plain == steered
    assert plain["model"] == "fake"
    assert plain["readout"] == {"layers": [2], "span": "generated", "project": ["kind"], "trace": ["kind"]}


@pytest.mark.parametrize(
    ("chosen", "entry"),
    [
        ("added", {"alpha": 8}),
        ("the projection", {"alpha": 8, "op": "set"}),
        ("its factor", {"alpha": 8, "op": "scale"}),
        ("its lower bound", {"low": 8, "op": "clamp"}),
        ("its upper bound", {"high": 8, "op": "clamp"}),
    ],
)
def test_alpha_is_what_was_chosen_and_zero_is_always_the_unsteered_reply(
    visit: Visit, fake: FakeSteeringServer, chosen: str, entry: dict[str, Any]
) -> None:
    visit.page.get_by_label("α is").select_option(chosen)
    visit.run()
    asked = [request["steering"] for request in fake.requests]
    common = {"direction": "kind", "layer": 2, "span": "response"}
    assert len(asked) == 2
    assert [common | {"alpha": 0}] in asked
    assert [common | entry] in asked
    for (one,) in asked:
        Steering.from_json(one)


def test_a_stop_is_asked_for_where_one_is_given_and_travels_in_the_link(
    browser: playwright.Browser, fake: FakeSteeringServer
) -> None:
    visit = Visit(browser, fake.url)
    visit.column(1).wait_for()
    visit.page.get_by_label("Stop above").fill("2.5")
    visit.run()
    stops = [request["readout"]["stop"] for request in fake.requests]
    assert stops == [{"direction": "kind", "above": 2.5, "layer": 2}] * 2
    again = Visit(browser, fake.url, fragment=f"#{visit.page.url.partition('#')[2]}")
    again.column(1).wait_for()
    assert again.page.get_by_label("Stop above").input_value() == "2.5"
    again.close()
    visit.close()


def test_every_token_carries_its_own_value_and_the_last_none(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    tokens = visit.column(1).locator(".output span")
    told = tokens.evaluate_all("(spans) => spans.map((span) => span.dataset.value)")
    values = fake.values(8)
    # the fourth token has no text: its value is part of the fifth's, as their mean
    expected: list[Any] = [*values[:3], (values[3] + values[4]) / 2, *values[5:], None]
    assert [None if text is None else float(text) for text in told] == expected
    colours = tokens.evaluate_all("(spans) => spans.map((span) => getComputedStyle(span).backgroundColor)")
    assert colours[0] == colours[5]  # 8 and 8
    assert len(set(colours[:3])) == 3  # 8, 9 and 10
    assert visit.page.locator("#centre").text_content() == f"{sum(fake.values(0)) / len(values):.3g}"
    # around its own mean a reply's tokens lie on both sides of the centre, and α itself is taken out
    visit.page.get_by_label("Shade each column around its own mean").check()
    apart = [
        visit.column(index).locator(".output span").evaluate_all("(s) => s.map((x) => x.style.backgroundColor)")
        for index in (0, 1)
    ]
    assert apart[0] == apart[1]
    assert "--low" in apart[1][0]
    assert "--high" in apart[1][2]


def test_a_value_can_be_read_by_pointer_and_by_keyboard(visit: Visit) -> None:
    visit.run()
    column = visit.column(1)
    column.locator(".output span").nth(1).hover()
    assert column.locator(".detail").text_content() == 'Token 2 " warm1": 9.00'
    column.locator(".output span").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        visit.page.keyboard.press(key)
    assert "Token 12" in str(column.locator(".detail").text_content())
    assert column.locator(".output [tabindex='0']").count() == 1


def test_a_dragged_alpha_runs_that_column_alone_again(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.run()
    fake.requests.clear()
    visit.column(1).get_by_role("slider").focus()
    visit.page.keyboard.press("Home")
    visit.page.locator("#status", has_text="α = −40").wait_for()
    assert [request["steering"][0]["alpha"] for request in fake.requests] == [-40]
    assert "cold" in visit.text(1)
    # another setting than α concerns all columns
    fake.requests.clear()
    visit.page.get_by_label("Seed").fill("7")
    visit.column(1).get_by_role("spinbutton").fill("3")
    visit.column(1).get_by_role("spinbutton").press("Tab")
    visit.page.locator("#status", has_text="α = +3").wait_for()
    assert sorted((request["seed"], request["steering"][0]["alpha"]) for request in fake.requests) == [(7, 0), (7, 3)]


def test_columns_come_and_go(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Add an α").click()
    assert visit.page.locator(".column").count() == 3
    visit.column(0).get_by_role("button", name="Remove").click()
    assert [visit.column(index).locator("h2").text_content() for index in range(2)] == ["α = +8", "α = −8"]


def test_a_link_brings_the_settings_back_and_holds_no_key(
    browser: playwright.Browser, fake: FakeSteeringServer
) -> None:
    fake.api_key = "sk-very-secret"
    first = Visit(browser, fake.url, path=OPEN)
    first.page.get_by_role("textbox", name="Key").fill("sk-very-secret")
    first.page.get_by_role("button", name="Use").click()
    first.column(1).wait_for()
    first.page.get_by_label("Prompt", exact=True).fill("Ça va? #1 & 2")
    first.page.get_by_label("Direction").select_option("wry")
    first.column(1).get_by_role("spinbutton").fill("-2.5")
    first.run()
    assert "secret" not in first.page.url
    assert all("secret" not in url for url in first.requests)
    assert first.page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    second = Visit(browser, fake.url, path=OPEN, fragment="#" + first.page.url.partition("#")[2])
    second.page.get_by_role("textbox", name="Key").fill("sk-very-secret")
    second.page.keyboard.press("Enter")
    second.column(1).wait_for()
    fields = {name: second.page.locator(f"[name={name}]").input_value() for name in ("prompt", "direction", "layer")}
    assert fields == {"prompt": "Ça va? #1 & 2", "direction": "wry", "layer": "1"}
    assert second.column(1).locator("h2").text_content() == "α = −2.5"
    for visit in (first, second):
        # the browser itself reports an answer of 401
        visit.complaints = [complaint for complaint in visit.complaints if "401" not in complaint]
        visit.close()


def test_stop_ends_the_streams_at_the_server_too(visit: Visit, fake: FakeSteeringServer) -> None:
    fake.tokens, fake.seconds_per_token = 400, 0.02
    visit.page.get_by_role("button", name="Run", exact=True).click()
    visit.page.locator(".output span").nth(3).wait_for()
    visit.page.get_by_role("button", name="Stop").click()
    visit.settle()
    assert visit.page.locator("#status").text_content() == "Stopped."
    assert len(visit.text(0)) < len("".join(fake.words(0)))
    visit.page.wait_for_timeout(300)  # until the fake has written into the closed connections
    assert fake.abandoned == 2


def test_a_refusal_is_shown_in_its_column_and_the_other_goes_on(visit: Visit, fake: FakeSteeringServer) -> None:
    visit.column(1).get_by_role("spinbutton").fill("900")
    visit.run()
    assert visit.column(1).get_by_role("alert").text_content() == "alpha is 900; use a smaller one"
    assert visit.text(0) == "".join(fake.words(0))
    assert visit.page.locator("#status").text_content() == "1 of 2 failed."
    visit.complaints = [complaint for complaint in visit.complaints if "400" not in complaint]


@pytest.mark.parametrize("mode", ["chat", "text"])
def test_the_code_it_gives_asks_for_the_same(visit: Visit, fake: FakeSteeringServer, mode: str) -> None:
    visit.page.get_by_label("Prompt", exact=True).fill('It\'s "quoted" \\ and\nnew')
    visit.page.get_by_label("Prompt is").select_option(mode)
    visit.run()
    asked = next(request for request in fake.requests if request["steering"][0]["alpha"] == 8)
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
    visit.page.get_by_role("button", name="Close").click()
    visit.column(1).get_by_role("button", name="curl").click()
    command = visit.page.locator("#code-text").input_value()
    assert shell_words_of(command)[-1] == asked


def shell_words_of(command: str) -> list[Any]:
    """The words of a command, the last one read as JSON."""
    words = shlex.split(command)
    return [*words[:-1], json.loads(words[-1])]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_theme_or_width_breaks_the_page(
    browser: playwright.Browser, fake: FakeSteeringServer, tmp_path: Path, scheme: str, viewport: dict[str, int]
) -> None:
    fake.tokens = 60
    visit = Visit(browser, fake.url, viewport=viewport, scheme=scheme, fragment="#alphas=-20,0,8")
    visit.column(2).wait_for()
    visit.run()
    visit.page.get_by_label("Numbers under the tokens").set_checked(viewport is PHONE)
    visit.page.screenshot(path=tmp_path / f"playground-{scheme}-{viewport['width']}.png", full_page=True)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    shade = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) / 3 < 64) == (scheme == "dark")
    visit.close()


def test_every_control_has_a_name_and_the_form_comes_first_by_keyboard(visit: Visit) -> None:
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll("body button, body input, body select, body textarea")]
             .filter((one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel
               || one.getAttribute("aria-labelledby"))).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    reached = []
    for _ in range(11):
        visit.page.keyboard.press("Tab")
        reached.append(visit.page.evaluate("document.activeElement.name || document.activeElement.textContent"))
    first = ["prompt", "direction", "layer", "span", "op", "stop_above"]
    assert reached[:-1] == [*first, "mode", "temperature", "seed", "max_tokens"]
    assert reached[-1] == "Run"


def test_a_server_without_the_playground_says_how_to_get_one() -> None:
    app = FastAPI()
    app.include_router(playground_router(lambda _: False))
    for path in PATHS:
        refused = TestClient(app).get(path)
        assert refused.status_code == 404
        assert "--playground" in refused.json()["error"]["message"]


def test_the_page_loads_nothing_and_its_policy_allows_no_other_script() -> None:
    page, policy = playground_page()
    assert re.findall(r"<(?:link|script|img|iframe)[^>]*", page) == ['<link rel="icon" href="data:,"', *["<script"] * 3]
    assert not re.search(r"\burl\(|@import|https?://", page)
    assert "{{" not in page
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy


@pytest.mark.server
def test_the_real_server_streams_shaded_tokens_into_the_page(
    browser: playwright.Browser, served: ServedModel, tmp_path: Path
) -> None:
    assert httpx.get(f"{served.url}{GUARDED}").status_code == 401
    visit = Visit(
        browser, served.url, path=OPEN, fragment="#direction=kind&mode=text&temperature=0&max_tokens=8&alphas=0,50"
    )
    visit.page.get_by_role("textbox", name="Key").fill(API_KEY)
    visit.page.get_by_role("button", name="Use").click()
    visit.column(1).wait_for()
    visit.run()
    assert "8 tokens" in str(visit.column(1).locator(".detail").text_content())
    assert visit.text(0) != visit.text(1)
    plain, steered = (
        [float(str(token.get_attribute("data-value")).replace("−", "-")) for token in shaded.all()]
        for shaded in (visit.column(index).locator(".output span[data-value]") for index in (0, 1))
    )
    # the texts differ and their streams with them, by less than the 50 that α itself adds along a unit direction
    assert sum(steered) / len(steered) > sum(plain) / len(plain) + 25
    visit.page.screenshot(path=tmp_path / "playground.png", full_page=True)
    visit.page.get_by_label("Stop above").fill("-1000000")
    visit.run()
    visit.page.locator("#status", has_text="stopped at").wait_for()
    assert str(visit.column(1).locator(".detail").text_content()).startswith("1 tokens, mean projection")
    visit.complaints = [complaint for complaint in visit.complaints if "401" not in complaint]
    visit.close()
