"""moto's S3 server in a process of its own: `python -m tests.support.s3_server_process`; see `s3_server.py`.

Prints its port, then carries out one word a line from its standard input and prints that word. Ends with the input. Its
objects outlive `stop` and `start`.

Not in a test's own process: vLLM looks through all loaded modules when a CPU engine starts, and the proxies of Flask,
on which moto runs, raise for that.
"""

from __future__ import annotations

import sys
from typing import Any

from moto.s3.exceptions import S3AccessDeniedError
from moto.s3.models import FakeMultipart
from moto.server import ThreadedMotoServer

_TAKE_PIECE = FakeMultipart.set_part


def _refuse_second_piece(self: FakeMultipart, part_id: int, *arguments: Any, **options: Any) -> Any:
    if part_id == 2:
        raise S3AccessDeniedError
    return _TAKE_PIECE(self, part_id, *arguments, **options)


def main() -> None:
    """Serve until the input ends."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    print(port, flush=True)
    for line in sys.stdin:
        match word := line.strip():
            case "stop":
                server.stop()
            case "start":
                server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
                server.start()
            case "refuse-second-piece":
                FakeMultipart.set_part = _refuse_second_piece
            case "take-all-pieces":
                FakeMultipart.set_part = _TAKE_PIECE
            case _:
                raise ValueError(word)
        print(word, flush=True)


if __name__ == "__main__":
    main()
