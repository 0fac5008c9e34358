"""The registry of a server: one truth for all its API server processes, changed while requests run.

A slot is written again only when nothing is registered in it and no request uses it. That holds across processes
without a lock on the way of requests: a request counts its slots as used and then looks whether the index is still the
one it found them in (``Admission.admit``); a change publishes an index without a slot and counts uses after that.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import IO

from vllm_steer.directions import Direction
from vllm_steer.engine.front import metrics
from vllm_steer.engine.front.slot_use import SlotUse
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry, Registered
from vllm_steer.errors import SettingsError, SteerError
from vllm_steer.server.registry.directory import Index, RegistryDirectory, Server

Write = Callable[[list[tuple[int, Direction]]], Awaitable[None]]
Check = Callable[[DirectionBook, DirectionBook], None]
"""Called with the book before a change and after it, alone among all processes; what it raises prevents the change."""


class SharedRegistry(DirectionBook):
    """One process's view of the registry.

    Args:
        directory: the files that all processes share.
        server: the server they belong to.
        capacity: slots of the bank.
        hidden_size: D; every vector must have this length.
        write: puts vectors into slots of the bank, on all workers.
    """

    def __init__(
        self, directory: RegistryDirectory, server: Server, capacity: int, hidden_size: int, write: Write
    ) -> None:
        super().__init__()
        self.directory = directory
        self.use = SlotUse(directory.use, capacity)
        self.capacity = capacity
        self.hidden_size = hidden_size
        self._server = server
        self._write = write
        self._index_file: IO[str] | None = None
        self._version: tuple[int, int] | None = None
        self._book = DirectionBook()
        self._uploaded: frozenset[tuple[str, int]] = frozenset()
        self._last_server = ""

    async def start(self, configured: Sequence[Direction]) -> None:
        """Join the other processes of the server, or be the first; to be awaited before any request is served.

        Args:
            configured: the directions of the configured files, which the workers have written at start-up.

        Raises:
            SettingsError: another server uses the folder.
            SteerError: a direction that was registered under an earlier server does not fit this one.
        """
        try:
            await self._start(configured)
        except SteerError:
            self.close()
            raise

    async def _start(self, configured: Sequence[Direction]) -> None:
        async with self.directory.locked():
            if self.directory.version() is not None:
                self.current()
                if self._last_server == self._server.name:
                    return
                if self.use.others():
                    raise SettingsError(
                        f"registry_dir {self.directory.path} is in use by another server (process "
                        f"{self._last_server}); give each server a folder of its own."
                    )
            files = DirectionRegistry(self.capacity, self.hidden_size)
            files.register(configured)
            # An upload takes the place of what a file has of the same name and layer, and may have its slot.
            rest = [one for one in files.all() if _key(one) not in self._uploaded]
            draft = DirectionRegistry(self.capacity, self.hidden_size, rest)
            uploaded = [self.directory.load_vector(one) for one in self._book.all() if _key(one) in self._uploaded]
            try:
                writes = draft.register(uploaded)
            except SteerError as error:
                raise type(error)(f"registry_dir {self.directory.path}: {error}") from None
            self.directory.save_vectors(configured)
            if writes:
                await self._write(writes)
            self._publish(draft, self._uploaded)

    def current(self) -> DirectionBook:
        """The book as last published by any process; the same object until something changes."""
        version = self.directory.version()
        # A folder that somebody removed under the running server changes nothing of what the bank holds.
        if version is not None and version != self._version:
            self._load()
        return self._book

    def find(self, name: str, layer: int | None, hooked: Collection[int]) -> Registered:
        return self.current().find(name, layer, hooked)

    def layers_of(self, name: str) -> dict[int, Registered]:
        return self.current().layers_of(name)

    def all(self) -> Iterable[Registered]:
        return self.current().all()

    async def put(self, directions: Sequence[Direction], check: Check) -> DirectionBook:
        """Register directions, all or none; returns the book with them.

        Raises:
            WrongDimension, BankFull, or what ``check`` raises.
        """
        async with self.directory.locked():
            before = self.current()
            draft = DirectionRegistry(self.capacity, self.hidden_size, before.all(), self.use.busy())
            writes = draft.register(directions)
            check(before, draft)
            uploaded = self._uploaded | {_key(direction) for direction in directions}
            if writes:
                self.directory.save_vectors(direction for _, direction in writes)
                await self._write(writes)
            if writes or uploaded != self._uploaded:
                self._publish(draft, uploaded)
            return self.current()

    async def remove(self, name: str, layer: int | None, check: Check) -> list[Registered]:
        """Forget a name, at one layer or at all; returns what that was. A direction of a file is back at a restart.

        Raises:
            UnknownDirection, or what ``check`` raises.
        """
        async with self.directory.locked():
            before = self.current()
            draft = DirectionRegistry(self.capacity, self.hidden_size, before.all())
            removed = draft.remove(name, layer)
            check(before, draft)
            self._publish(draft, self._uploaded - {_key(one) for one in removed})
            return removed

    def show_bank(self) -> tuple[int, int, int]:
        """Slots that are registered, held by running requests only, and free; sets the metric too."""
        registered = {one.slot for one in self.all()}
        held = len(self.use.busy() - registered)
        slots = (len(registered), held, self.capacity - len(registered) - held)
        metrics.bank(*slots)
        return slots

    def released(self, slots: Iterable[int]) -> None:
        """To be called when requests have ended that used these slots."""
        if not {one.slot for one in self._book.all()}.issuperset(slots):
            self.show_bank()

    def close(self) -> None:
        """Leave the registry: this process uses no slot any more."""
        self.use.close()
        if self._index_file is not None:
            self._index_file.close()

    def _publish(self, draft: DirectionBook, uploaded: frozenset[tuple[str, int]]) -> None:
        self.directory.publish(Index(self._server.name, tuple(draft.all()), uploaded))
        self.show_bank()

    def _load(self) -> None:
        file = self.directory.open_index()
        try:
            index = Index.read(file)
        except SettingsError:
            file.close()
            raise
        if self._index_file is not None:
            self._index_file.close()
        # Kept open: as long as the file exists, no other index has its inode, so the version cannot be mistaken.
        self._index_file = file
        status = os.fstat(file.fileno())
        self._version = status.st_dev, status.st_ino
        self._book, self._uploaded, self._last_server = DirectionBook(index.registered), index.uploaded, index.server


def _key(one: Direction | Registered) -> tuple[str, int]:
    return one.name, one.layer
