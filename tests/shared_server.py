"""Distributes the tests of a parallel run to its processes: tests that share a server stay together."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

SERVER_TESTS = "tests/server"


class SharedServerScheduling(LoadFileScheduling):  # type: ignore[misc]
    """Distributes by file, whose tests share an engine; but all tests of a folder that share a server stay together.

    `--dist loadgroup` would do, but xdist 3.8 names a test's group where pytest 9.2 no longer looks for it.
    """

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return SERVER_TESTS if scope.rpartition("/")[0] == SERVER_TESTS else scope
