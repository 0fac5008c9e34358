"""A real S3 server on this machine, which a test can take away and bring back with its objects."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "studies"


class S3Server:
    """moto's server in a thread of this process; its objects outlive `stop` and `start`."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()
        self.request("PUT", f"/{BUCKET}")

    def address(self, folder: str, bucket: str = BUCKET) -> str:
        """An address that names this server, for processes without AWS_ENDPOINT_URL."""
        return f"s3://{bucket}/{folder}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request without a signature, which this server does not ask for."""
        url = f"http://127.0.0.1:{self.port}{path}"
        raw = {"Content-Type": "application/octet-stream"}
        with urllib.request.urlopen(urllib.request.Request(url, body, raw, method=method), timeout=30) as reply:
            return bytes(reply.read())

    def ask_for_permissions(self) -> None:
        """From now on, refuse requests of users that do not exist, which is everyone."""
        self.request("POST", "/moto-api/reset-auth", b"0")

    def stop(self) -> None:
        """Refuse connections."""
        self._server.stop()

    def start(self) -> None:
        """Answer again, at the same port."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def reset(self) -> None:
        """Forget all objects and ask for no permissions."""
        self.request("POST", "/moto-api/reset-auth", b"1000000000")
        self.request("POST", "/moto-api/reset")
        self.request("PUT", f"/{BUCKET}")


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
            server.stop()
