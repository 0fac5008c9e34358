"""The playground in headless Chromium against a fake server, whose replies and deaths a test can choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.server.fake_steering_server import FakeSteeringServer, fake_steering_server
from tests.support.server.playground_visit import Visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.browser import chromium  # skips the test where there is none

    with chromium() as running:
        yield running


@pytest.fixture
def fake() -> Iterator[FakeSteeringServer]:
    with fake_steering_server() as server:
        yield server


@pytest.fixture
def visit(browser: Browser, fake: FakeSteeringServer) -> Iterator[Visit]:
    visit = Visit(browser, fake.url)
    yield visit
    visit.close()
