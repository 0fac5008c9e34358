"""A run directory in an object store, and the local copy of it that the steps of a study read and write.

Rows and attempts are written in the store, by whoever generates them. All other files are made in the copy and
published from there; so the steps know nothing of stores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batch_jobs.files.object_store import Stored, StorePath, each
from vllm_steer.errors import SteerError

NEVER_COPIED = ("attempts", "drivers")
"""Folders of the run directory that are used in the store alone."""


class WorkingCopy:
    """The copy in `folder` of the run directory at `store`. Sent to another process, it remembers no file."""

    def __init__(self, folder: Path, store: StorePath) -> None:
        self.folder = folder
        self.store = store
        self._stored: dict[str, Stored] = {}  # state in the store when the copy was last equal to it
        self._local: dict[str, tuple[int, int]] = {}  # size and time of the local file at that moment
        self._lock = threading.Lock()
        self.check_held: Callable[[], None] = lambda: None
        """Raises StudyError when the run is another driver's by now; see `DriverLock.check`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (WorkingCopy, (self.folder, self.store))

    def fetch(self) -> None:
        """Bring every file of the store that is new or was changed since.

        Raises:
            StoreError: the store refuses.
            OSError: the local disk does.
        """
        with self._lock:
            found = {name: state for name, state in self.store.files().items() if _is_copied(name)}
            wanted = [name for name, state in found.items() if self._stored.get(name) != state]
            each(wanted, self._fetch_file)
            for name in wanted:
                self._stored[name] = found[name]
                self._local[name] = _state_of(self.folder / name)

    def publish(self) -> None:
        """Write to the store what was changed in the copy since, and delete there what was deleted here.

        Raises:
            StoreError: the store refuses; what it did not take is published by the next call.
        """
        with self._lock:
            here = {name: _state_of(self.folder / name) for name in _files(self.folder)}
            each([name for name, state in here.items() if self._local.get(name) != state], self._publish_file)
            each([name for name in self._local if name not in here], self._delete_file)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files and folders in the store, by their paths in the run directory. The local ones stay.

        Raises:
            StoreError: the store refuses.
        """
        names = tuple(names)
        with self._lock:
            doomed = [one for one in self.store.files() if any(f"{one}/".startswith(f"{name}/") for name in names)]
            each(doomed, self._delete_file)

    @contextmanager
    def in_messages(self) -> Iterator[None]:
        """Name the store instead of the copy in the messages of errors."""
        try:
            yield
        except SteerError as error:
            error.args = tuple(self.shown(one) if isinstance(one, str) else one for one in error.args)
            raise

    def shown(self, text: str) -> str:
        """The text with the store's address in place of the copy's folder."""
        return text.replace(str(self.folder), self.store.shown)

    def _fetch_file(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((self.store / name).read_bytes())

    def _publish_file(self, name: str) -> None:
        state = _state_of(self.folder / name)  # before reading: a later change is seen by the next call
        target = self.store / name
        target.write_bytes((self.folder / name).read_bytes())
        stored = target.state()
        if stored is not None:
            self._stored[name] = stored
        self._local[name] = state

    def _delete_file(self, name: str) -> None:
        (self.store / name).unlink(missing_ok=True)
        self._stored.pop(name, None)
        self._local.pop(name, None)


def _is_copied(name: str) -> bool:
    first, *_ = name.split("/")
    return first not in NEVER_COPIED and not name.rpartition("/")[2].startswith(".")


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if _is_copied(name) and path.is_file():
            yield name


def _state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
