"""The vLLM of this environment, read as source once for all tests of the folder."""

from __future__ import annotations

import pytest

from tests.compat.check import installed
from tests.compat.vllm_source import VllmSource


@pytest.fixture(scope="session")
def source() -> VllmSource:
    """The installed vLLM as source."""
    return installed()
