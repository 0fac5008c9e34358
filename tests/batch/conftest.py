"""The S3 server that tests of run directories in an object store share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(_s3_server: S3Server) -> S3Server:
    """An S3 server with one empty bucket; the environment holds credentials for it."""
    _s3_server.reset()
    return _s3_server
