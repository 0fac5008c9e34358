"""Coverage of `vllm_steer` and `batch_jobs` by the tests that start no engine and no server, with a floor.

Python 3.11's tracer makes engines start half as slow again, so it pauses while a test runs that is marked `engine`,
`server`, `slow` or `ray`. What such a test alone reaches counts as not covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

PROJECT = Path(__file__).resolve().parents[1]
_UNMEASURED = ("engine", "server", "slow", "ray")


class CoverageFloor:
    """A pytest plugin; each process of a parallel run measures its own tests, and the first one adds them up.

    Args:
        floor: percentage of statements and branches below which the run fails.
        worker: name of this process in a parallel run; None for the only one, or the one that only distributes.
        data_file: where the measurements are kept during the run.
        has_workers: this process runs no tests, others do.
    """

    def __init__(self, floor: float, worker: str | None, data_file: Path, has_workers: bool) -> None:
        self._floor = floor
        self._worker = worker
        self._data_file = data_file
        self._coverage = coverage.Coverage(
            data_file=str(data_file),
            data_suffix=worker or "main",
            source=[str(PROJECT / name) for name in ("vllm_steer", "batch_jobs")],
            branch=True,
        )
        self._coverage.exclude("if TYPE_CHECKING:")
        self._result = ""
        self._measures = not has_workers
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
        if self._worker is not None:
            return
        whole = coverage.Coverage(data_file=str(self._data_file))
        whole.combine()
        whole.exclude("if TYPE_CHECKING:")
        table = self._data_file.parent / "coverage.txt"
        with table.open("w", encoding="utf-8") as file:
            total = whole.report(file=file, show_missing=True)
        verdict = "" if total >= self._floor else f", below the floor of {self._floor:g} %"
        self._result = f"coverage without engines and servers: {total:.1f} %{verdict}; {table}"
        if verdict and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the total."""
        terminalreporter.write_line(self._result)
