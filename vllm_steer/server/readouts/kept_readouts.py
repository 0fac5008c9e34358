"""Keeps the readouts of finished replies for a while, by the reply's id."""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from vllm_steer.engine.log import logger
from vllm_steer.errors import ReadoutNotFound

_MIB = 1 << 20


class KeptReadouts:
    """Readouts by reply id and API key, in a folder that all API server processes of a server share.

    Each process removes its own oldest files, so processes need no lock. Threads of one may call ``keep`` at once.

    Args:
        folder: the folder; it must exist.
        mib: most MiB of all processes together; 0 keeps nothing.
        seconds: a readout is kept so long.
        processes: number of API server processes.
    """

    def __init__(self, folder: Path, mib: int, seconds: float, processes: int = 1) -> None:
        self._folder = folder
        self._mib = mib
        self._most_bytes = mib * _MIB // processes
        self._seconds = seconds
        self._own: OrderedDict[Path, tuple[float, int]] = OrderedDict()  # file -> time and size, oldest first
        self._bytes = 0
        self._lock = Lock()

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._mib > 0

    def keep(self, reply_id: str, key: str | None, readouts: list[dict[str, Any]]) -> None:
        """Keep the readouts of a reply, in place of those kept under this id before.

        Blocks for one small file. What is larger than all that may be kept is not kept; nor is what the disk refuses,
        which the log then says.

        Args:
            reply_id: the id in the reply.
            key: the API key of its request.
            readouts: ``{"index", "readout"}`` of each choice.
        """
        text = json.dumps({"id": reply_id, "readouts": readouts}, separators=(",", ":")).encode()
        with self._lock:
            try:
                self._put(self._path(reply_id, key), text)
            except OSError as error:
                logger.warning("The readouts of the reply %s are not kept: %s", reply_id, error)

    def _put(self, path: Path, text: bytes) -> None:
        self._drop(path)
        if len(text) > self._most_bytes:
            return
        self._make_room(len(text))
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(text)
        draft.replace(path)
        self._own[path] = (time.monotonic(), len(text))
        self._bytes += len(text)

    def load(self, reply_id: str, key: str | None) -> bytes:
        """The JSON text ``{"id", "readouts": [{"index", "readout"}, ...]}``.

        Raises:
            ReadoutNotFound: nothing is kept under this id and key.
        """
        path = self._path(reply_id, key)
        try:
            if time.time() - path.stat().st_mtime <= self._seconds:
                return path.read_bytes()
        except FileNotFoundError:
            pass
        raise ReadoutNotFound(
            f"no readout is kept under {reply_id[:80]!r}; allowed: the id of a reply with a readout, asked with the "
            f"same API key within {self._seconds:g} seconds, as long as {self._mib} MiB hold all. Ask again, or raise "
            "kept_readouts_mib and kept_readouts_seconds in the server's settings."
        )

    def _path(self, reply_id: str, key: str | None) -> Path:
        return self._folder / sha256(f"{key or ''}\0{reply_id}".encode()).hexdigest()

    def _make_room(self, size: int) -> None:
        now = time.monotonic()
        while self._own:
            path, (kept, _) = next(iter(self._own.items()))
            if self._bytes + size <= self._most_bytes and now - kept <= self._seconds:
                return
            self._drop(path)

    def _drop(self, path: Path) -> None:
        _, size = self._own.pop(path, (0.0, 0))
        if size:
            self._bytes -= size
            path.unlink(missing_ok=True)
