"""The report in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_jobs.report.page import write_report
from tests.browser import DESKTOP, PHONE, chromium, playwright
from tests.support.synthetic_run import demo_rows, write_run

pytestmark = pytest.mark.slow

SETTINGS, ALPHAS, SHOWN = 2, 7, 209


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("run"), demo_rows(layers=(12, 16))))


class Visit:
    """An open report, with the page's complaints and requests."""

    def __init__(self, browser: playwright.Browser, report: Path, viewport: dict[str, int], scheme: str) -> None:
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())

    @property
    def tally(self) -> str:
        return str(self.page.locator("#filter output").text_content())

    @property
    def visible_samples(self) -> list[str]:
        """Their verdicts, as the page's data has them."""
        shown = self.page.locator("article.sample:not([hidden])")
        return [str(one.get_attribute("data-verdicts")) for one in shown.all() if one.is_visible()]

    def choose(self, **fields: str) -> None:
        for name, label in fields.items():
            self.page.locator(f"#filter [name={name}]").select_option(label=label)

    def clear(self) -> None:
        self.page.locator("#filter button").click()
        # the page narrows in a timer after the reset; a timer set later runs later
        self.page.evaluate("() => new Promise((done) => setTimeout(done))")

    def close(self) -> None:
        """The page must have been silent and must have loaded nothing but itself."""
        url = self.page.url
        self.page.close()
        assert self.complaints == []
        assert self.requests == [url]


@pytest.fixture
def visit(browser: playwright.Browser, report: Path) -> Iterator[Visit]:
    visit = Visit(browser, report, DESKTOP, "light")
    yield visit
    visit.close()


def test_the_page_opens_on_one_condition_unfolded(visit: Visit) -> None:
    assert visit.tally == f"5 of {SHOWN} samples, in 1 of {3 * SETTINGS * ALPHAS} conditions"
    assert len(visit.visible_samples) == 5


def test_filters_narrow_together_and_the_count_follows(visit: Visit) -> None:
    visit.clear()
    assert visit.tally == f"{SHOWN} of {SHOWN} samples, in 42 of 42 conditions"
    visit.choose(scenario="The Listener")
    assert visit.tally == f"{5 * SETTINGS * ALPHAS} of {SHOWN} samples, in 14 of 42 conditions"
    visit.choose(setting="layer 16", alpha="72")
    assert visit.tally == f"5 of {SHOWN} samples, in 1 of 42 conditions"
    # everybody is kind to the listener at the largest α
    visit.choose(verdict="not empathetic")
    assert visit.tally == f"0 of {SHOWN} samples, in 0 of 42 conditions"
    assert visit.visible_samples == []


def test_a_verdict_shows_only_samples_that_have_it(visit: Visit) -> None:
    visit.clear()
    visit.choose(verdict="loop")
    # samples 1 and 3 of each scenario and layer loop at the lowest α
    count = int(visit.tally.split()[0])
    assert count == 2 * 3 * SETTINGS
    assert all("loop" in verdicts.split("|") for verdicts in visit.visible_samples)
    assert len(visit.visible_samples) == count
    visit.choose(verdict="empty")
    assert visit.tally.startswith("1 of ")


def test_words_are_searched_without_regard_to_case(visit: Visit) -> None:
    visit.clear()
    visit.page.locator("#filter [name=words]").fill("EVIL.example")
    assert visit.tally == f"1 of {SHOWN} samples, in 1 of 42 conditions"
    assert "<script>alert('x')</script>" in visit.page.locator("article.sample:not([hidden])").inner_text()


def test_the_filter_works_from_the_keyboard(visit: Visit) -> None:
    visit.page.locator("#filter [name=scenario]").focus()
    reached = []
    for _ in range(6):
        reached.append(visit.page.evaluate("document.activeElement.name || document.activeElement.type"))
        visit.page.keyboard.press("Tab")
    assert reached == ["scenario", "setting", "alpha", "verdict", "words", "reset"]
    visit.page.locator("#filter [name=words]").focus()
    visit.page.keyboard.type("sorry")
    visit.page.keyboard.press("Enter")  # must not send the form anywhere
    assert "?" not in visit.page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_theme_or_width_breaks_the_page(
    browser: playwright.Browser, report: Path, tmp_path: Path, scheme: str, viewport: dict[str, int]
) -> None:
    visit = Visit(browser, report, viewport, scheme)
    page = visit.page
    page.screenshot(path=tmp_path / f"report-{scheme}-{viewport['width']}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    # figures take the page's colours: the paper of the first one is the page's own
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    figure = page.evaluate("getComputedStyle(document.querySelector('.sheet svg path')).fill")
    assert figure == paper
    shade = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (shade < 64) == (scheme == "dark")
    visit.close()


def test_no_text_of_a_figure_leaves_its_sheet(visit: Visit) -> None:
    outside = visit.page.evaluate(
        """() => [...document.querySelectorAll(".sheet svg")].flatMap((svg) => {
             const box = svg.getBoundingClientRect();
             return [...svg.querySelectorAll("text")].filter((text) => {
               const own = text.getBoundingClientRect();
               return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 1
                 || own.bottom > box.bottom + 1;
             }).map((text) => text.textContent);
           })"""
    )
    assert outside == []


def test_the_numbers_of_every_figure_can_be_downloaded(
    browser: playwright.Browser, report: Path, tmp_path: Path
) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.goto(report.as_uri())
    links = page.locator("figure a[download]")
    assert links.count() == page.locator("figure svg").count() > 5
    for link in links.all():
        page.reload()  # Chromium asks its user after ten quick downloads from one page
        with page.expect_download() as waiting:
            link.click()
        saved = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(saved)
        assert saved.read_bytes() == (report.parent / "figures" / saved.name).read_bytes()
        rows = list(csv.DictReader(saved.read_text(encoding="utf-8").splitlines()))
        assert rows
        assert {"panel", "series", "x", "y", "low", "high"} == set(rows[0])
        assert all(math.isfinite(float(row["y"])) for row in rows)
    page.close()


def test_a_wide_table_on_a_phone_keeps_the_name_of_its_row_in_view(browser: playwright.Browser, report: Path) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(report.as_uri())
    wide = [
        region
        for region in page.locator(".scroll:has(table)").all()
        if region.evaluate("(one) => one.scrollWidth > one.clientWidth + 40")
    ]
    assert wide
    for region in wide:
        region.evaluate("(one) => { one.scrollLeft = one.scrollWidth; }")
        inside = region.evaluate(
            """(one) => {
              const box = one.getBoundingClientRect();
              const name = one.querySelector("tbody tr > :first-child:not([colspan])").getBoundingClientRect();
              const last = one.querySelector("tbody tr > :last-child:not([colspan])").getBoundingClientRect();
              return [name.left >= box.left - 1, name.right <= box.left + box.width / 2, last.right <= box.right + 1];
            }"""
        )
        assert inside == [True, True, True], region.get_attribute("aria-label")
    page.close()
