"""Which process of a parallel run gets which tests: those that share a server stay together."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

SERVER_TESTS = "tests/server"


class SharedServerScheduling(LoadFileScheduling):  # type: ignore[misc]
    """By file, whose tests share an engine, except that all tests of a folder that share a server stay together.

    `--dist loadgroup` would do, but xdist 3.8 names a test's group where pytest 9.2 no longer looks for it.
    """

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return SERVER_TESTS if scope.rpartition("/")[0] == SERVER_TESTS else scope
