"""A visit to the playground by a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.server.playground.page import PATHS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

GUARDED, OPEN = PATHS
SETTLED_MS = 10_000


class Visit:
    """An open playground, with the page's complaints and requests.

    Args:
        browser: the browser.
        url: the server, without a path.
        key: the API key to give when the page asks for one; ``None`` if it does not ask.
        path, fragment: where the page is, and the settings of a link, with ``#``.
        options: of the browser's context, such as ``viewport``.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        key: str | None = None,
        path: str = OPEN,
        fragment: str = "",
        waits: bool = True,
        clock: bool = False,
        **options: Any,
    ) -> None:
        self.server = url
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(SETTLED_MS)
        if clock:
            self.page.clock.install()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.expected: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{url}{path}{fragment}")
        if key is not None:
            self.expected.append("401")  # the browser itself reports such an answer
            self.page.get_by_label("Key", exact=True).fill(key)
            self.page.get_by_role("button", name="Use").click()
        if waits:
            self.column(0).wait_for()

    def column(self, index: int) -> Locator:
        return self.page.locator(".column").nth(index)

    def names(self) -> list[str]:
        """The headings of the columns."""
        return [str(text) for text in self.page.locator(".column > h2").all_text_contents()]

    def text(self, index: int, sample: int = 0) -> str:
        return str(self.column(index).locator(".output").nth(sample).text_content())

    def number(self, index: int, name: str = "α") -> Locator:
        """The field of a column's number."""
        return self.column(index).get_by_label(re.compile(rf"^{name}(norms)?$"))

    def type_number(self, index: int, text: str, name: str = "α") -> None:
        """Type into the field and leave it."""
        self.number(index, name).fill(text)
        self.number(index, name).press("Tab")

    def entry(self, index: int) -> Locator:
        """The fields of a direction to steer with."""
        return self.page.locator("fieldset.entry").nth(index)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def status(self) -> str:
        return str(self.page.locator("#status").text_content())

    def add(self, label: str) -> None:
        """Add a column of a kind."""
        self.page.locator("#kind").select_option(label=label)
        self.button("Add column").click()

    def run(self) -> None:
        self.button("Run").click()
        self.settle()

    def settle(self, pattern: str = r"\d tokens?|complete|failed|Stopped") -> None:
        self.page.locator("#status", has_text=re.compile(pattern)).wait_for()

    def saved(self, name: str, folder: Path) -> Path:
        """The file that a button saves."""
        with self.page.expect_download() as download:
            self.button(name).click()
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def fragment(self) -> str:
        return "#" + str(self.page.url).partition("#")[2]

    def close(self) -> None:
        """The page must have been silent, but for ``expected``, and must have spoken to its own server only."""
        self.context.close()
        assert [text for text in self.complaints if not any(part in text for part in self.expected)] == []
        assert all(url.startswith((self.server, "data:", f"blob:{self.server}")) for url in self.requests), (
            self.requests
        )
