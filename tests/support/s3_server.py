"""A real S3 server on this machine, which a test can take away and bring back with its objects."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BUCKET = "studies"
PROJECT_ROOT = Path(__file__).resolve().parents[2]


class S3Server:
    """The server of `s3_server_process.py` with one bucket."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.s3_server_process"],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.port = int(self._read())
        self._request("PUT", f"/{BUCKET}")

    def address(self, folder: str, bucket: str = BUCKET) -> str:
        """An address that names this server, for processes without AWS_ENDPOINT_URL."""
        return f"s3://{bucket}/{folder}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def ask_for_permissions(self) -> None:
        """From now on, refuse requests of users that do not exist, which is everyone."""
        self._request("POST", "/moto-api/reset-auth", b"0")

    def tell(self, word: str) -> None:
        """Carry out `stop` (refuse connections), `start` (answer again, at the same port), `refuse-second-piece` of
        every upload in pieces, or `take-all-pieces`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self._read() == word

    def reset(self) -> None:
        """Forget all objects and ask for no permissions."""
        self._request("POST", "/moto-api/reset-auth", b"1000000000")
        self._request("POST", "/moto-api/reset")
        self._request("PUT", f"/{BUCKET}")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _request(self, method: str, path: str, body: bytes = b"") -> None:
        """Send a request without a signature, which the server does not ask for."""
        url, raw = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/octet-stream"}
        with urllib.request.urlopen(urllib.request.Request(url, body, raw, method=method), timeout=30) as reply:
            reply.read()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """The server, and the environment in which pyarrow finds credentials for it and looks for no others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTING")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret-of-the-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = S3Server()
        try:
            yield server
        finally:
            server.process.kill()
            server.process.communicate()
