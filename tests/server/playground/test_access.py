"""Keyboard, narrow screens, themes and accessibility; and what the page may load."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.support.server.fake_steering_server import FakeSteeringServer
from tests.support.server.playground_visit import Visit
from vllm_steer.server.playground.page import PATHS, playground_page, playground_router

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

AXE = Path(__file__).parents[2] / "clients" / "node_modules" / "axe-core" / "axe.min.js"
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core, as tests/clients/package.json pins it."""
    if not AXE.exists() and "VLLM_STEER_REQUIRE_NODE" not in os.environ:
        pytest.skip("axe-core is not installed: npm ci --prefix tests/clients")
    return AXE.read_text(encoding="utf-8")


def full_page(browser: Browser, fake: FakeSteeringServer, **options: Any) -> Visit:
    """A page with all that it can show: three columns of two samples, two directions, a failure and earlier turns."""
    fake.tokens = 20
    fragment = '#n=2&columns=[{"kind":"plain"},{"kind":"steered","alpha":-20},{"kind":"alias","alias":"fake-kind"}]'
    visit = Visit(browser, fake.url, fragment=fragment, **options)
    visit.expected.append("400")
    visit.button("Add a direction").click()
    visit.run()
    visit.button("Next turn").click()
    visit.page.get_by_label("Prompt", exact=True).fill("And then?")
    visit.add("another number")
    visit.number(3).fill("900")
    visit.run()
    visit.page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    return visit


@pytest.mark.parametrize(
    ("scheme", "viewport"), [("light", DESKTOP), ("dark", PHONE)], ids=["light-desktop", "dark-phone"]
)
def test_no_theme_or_width_breaks_the_page_and_axe_finds_nothing(
    browser: Browser, fake: FakeSteeringServer, tmp_path: Path, axe: str, scheme: str, viewport: dict[str, int]
) -> None:
    visit = full_page(browser, fake, viewport=viewport, color_scheme=scheme)
    visit.page.get_by_label("Numbers under the tokens").set_checked(viewport is PHONE)
    visit.page.screenshot(path=tmp_path / f"playground-{scheme}-{viewport['width']}.png", full_page=True)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    shade = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) / 3 < 64) == (scheme == "dark")
    visit.page.evaluate(axe)
    assert violations(visit) == []
    visit.page.get_by_label("Words that differ").check()
    visit.page.get_by_label("Seed", exact=True).fill("9")  # marks the answers as those of the last run
    assert visit.page.locator("#stale").is_visible()
    dialogs = [visit.button("API key"), visit.button("Register a direction"), visit.button("curl").first]
    if viewport is DESKTOP:
        assert violations(visit) == []
    for opens in dialogs if viewport is PHONE else []:
        opens.click()
        assert violations(visit) == []
        assert visit.page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        visit.page.keyboard.press("Escape")
    visit.close()


def violations(visit: Visit) -> list[str]:
    """What axe-core complains about, each rule with the first element."""
    found = visit.page.evaluate("axe.run()")
    # a check that could find nothing to look at would be no check
    assert len(found["passes"]) > 10
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]} {one['nodes'][0]['failureSummary']}"
        for one in found["violations"]
    ]


def test_everything_can_be_done_by_keyboard(visit: Visit, fake: FakeSteeringServer) -> None:
    reached = []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.append(
            visit.page.evaluate(
                """() => { const one = document.activeElement;
                     return one.id || one.name || one.className || one.textContent.trim(); }"""
            )
        )
    assert reached[:5] == ["ask-key", "ask-register", "prompt", "main", "System prompt"]
    assert reached[5:11] == ["direction", "layer", "op", "span", "add-entry", "unit"]
    for name in ("mode", "temperature", "seed", "n", "max_tokens", "measured", "stop_direction", "kind", "add", "link"):
        assert name in reached
    assert {"save-json", "save-png", "again", "apart", "numbers", "words", "range", "number", "remove"} <= set(reached)
    visit.page.get_by_label("Prompt", exact=True).focus()
    visit.page.keyboard.press("Control+Enter")
    visit.settle()
    assert len(fake.requests) == 2


def test_every_control_has_a_name(browser: Browser, fake: FakeSteeringServer) -> None:
    visit = full_page(browser, fake)
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll("body button, body input, body select, body textarea")]
             .filter((one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel
               || one.getAttribute("aria-labelledby"))).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    visit.close()


def test_text_of_the_server_is_never_markup(visit: Visit, fake: FakeSteeringServer) -> None:
    bad = "<img src=x onerror=alert(1)><b>"
    fake.directions[0]["name"] = bad
    visit.page.reload()
    visit.column(1).wait_for()
    visit.entry(0).get_by_label("Direction").select_option(bad)
    visit.add("another number")
    visit.run()
    assert visit.page.locator("img, b").count() == 0
    assert bad in str(visit.page.locator("#legend-text").text_content())


def test_a_server_without_the_playground_says_how_to_get_one() -> None:
    app = FastAPI()
    app.include_router(playground_router(lambda _: False))
    for path in PATHS:
        refused = TestClient(app).get(path)
        assert refused.status_code == 404
        assert "--playground" in refused.json()["error"]["message"]


def test_the_page_loads_nothing_and_its_policy_allows_no_other_script() -> None:
    page, policy = playground_page()
    number = len(re.findall(r"'sha256-", policy)) - 1  # one of them is the style
    assert number > 10
    links = re.findall(r"<(?:link|script|img|iframe)[^>]*", page)
    assert links == ['<link rel="icon" href="data:,"', *["<script"] * number]
    assert not re.search(r"\burl\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "{{" not in page
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
