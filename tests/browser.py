"""The browser of the tests that need one: the system's Chromium, headless, driven by Playwright.

A test module that imports this is skipped, with the reason, where Playwright or Chromium is missing; with
VLLM_STEER_REQUIRE_BROWSER=1 it fails instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

REQUIRED = os.environ.get("VLLM_STEER_REQUIRE_BROWSER") == "1"
if REQUIRED:
    import playwright.sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dev extra)")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1200, "height": 900}


@contextmanager
def chromium() -> Iterator[playwright.Browser]:
    """A running browser, closed at the end."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    executable = next((path for path in found if path), None)
    if executable is None:
        reason = "no chromium, chromium-browser or google-chrome on PATH"
        if REQUIRED:
            pytest.fail(f"{reason}, and VLLM_STEER_REQUIRE_BROWSER=1 asks for one")
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield browser
        browser.close()
