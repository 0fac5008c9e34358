"""Plugin of pytest: `-p tests.compat.run_beside --vllm-release 0.33.0` ends a run whose vLLM is another release.

`tests.compat.overlay` makes the environment for such a run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat.check import installed
from tests.compat.overlay import PROVENANCE
from vllm_steer.engine.vllm_versions import vllm_version


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm-release", required=True, help="the release of vLLM that must be imported")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compare the release that was asked for with the code that is imported and with its metadata."""
    import vllm  # not before tests/conftest.py has set the environment, which vLLM reads at import

    wanted = session.config.getoption("--vllm-release")
    found = {"code": vllm.__version__, "metadata": vllm_version()}
    folder = Path(vllm.__file__).parents[1]
    if {one.partition("+")[0] for one in found.values()} != {wanted} or folder != installed().root:
        pytest.exit(f"this run is to be beside vLLM {wanted}; found {found} in {folder}", returncode=3)


def pytest_report_header() -> str:
    provenance = installed().root / PROVENANCE
    return f"vLLM: {provenance.read_text(encoding='utf-8').strip() if provenance.is_file() else 'as installed'}"
