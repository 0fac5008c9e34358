"""Coverage of `vllm_steer` and `batch_jobs` by the tests that start no engine and no server, with a floor.

Python 3.11's tracer makes engines start half as slow again, so it pauses while a test runs that is marked `engine`,
`server`, `slow` or `ray`. What such a test alone reaches counts as not covered.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "build" / "coverage"
DATA_FILE = str(FOLDER / "data")
_ELSEWHERE = (
    "batch_jobs/harnesses/lm_eval_model.py",
    "batch_jobs/harnesses/evaluate.py",
    "batch_jobs/harnesses/inspect_provider.py",
)
"""Modules that need lm-eval or Inspect, which only the tests of `make test-harnesses` and `make test-clients` have."""
_UNMEASURED = ("engine", "server", "slow", "ray")


class CoverageFloor:
    """A pytest plugin; each process of a parallel run measures its own tests, and the first one adds them up.

    Args:
        floor: percentage of statements and branches below which the run fails.
        config: of this process.
    """

    def __init__(self, floor: float, config: pytest.Config) -> None:
        self._floor = floor
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        self._adds_up = worker is None
        self._measures = worker is not None or not config.getoption("numprocesses", default=None)
        self._result = ""
        if self._adds_up:
            shutil.rmtree(FOLDER, ignore_errors=True)
            FOLDER.mkdir(parents=True)
        self._coverage = coverage.Coverage(
            data_file=DATA_FILE,
            data_suffix=worker or "main",
            source=[str(PROJECT / name) for name in ("vllm_steer", "batch_jobs")],
            omit=[str(PROJECT / name) for name in _ELSEWHERE],
            branch=True,
        )
        if self._measures:
            self._coverage.start()  # modules are imported, and their statements run, while tests are collected

    def pytest_collection_finish(self) -> None:
        """Stop measuring until a test runs."""
        if self._measures:
            self._coverage.stop()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure one test with its fixtures."""
        if any(item.get_closest_marker(name) for name in _UNMEASURED):
            return (yield)
        self._coverage.start()
        try:
            return (yield)
        finally:
            self._coverage.stop()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Save what this process measured; the first process adds all up, and fails the run below the floor."""
        if self._measures:
            self._coverage.stop()
            self._coverage.save()
        if not self._adds_up or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        whole = coverage.Coverage(data_file=DATA_FILE)
        whole.combine()
        whole.exclude("if TYPE_CHECKING:")
        table = FOLDER / "coverage.txt"
        with table.open("w", encoding="utf-8") as file:
            total = whole.report(file=file, show_missing=True)
        verdict = "" if total >= self._floor else f", below the floor of {self._floor:g} %"
        self._result = f"coverage without engines and servers: {total:.1f} %{verdict}; {table}"
        if verdict:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the total."""
        if self._result:
            terminalreporter.write_line(self._result)
