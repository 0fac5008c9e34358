"""The registry of a server, shared by all its API server processes and changed while requests run.

A slot is rewritten only when nothing is registered in it and no request uses it. Requests need no lock for that, even
across processes. A request first counts its slots as used, and then checks that the index is still the one in which it
found them (``Admission.admit``). A change first publishes an index without the slot, and then counts the uses.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vllm_steer.directions import Direction
from vllm_steer.engine.front import metrics
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.all_engines import call_workers
from vllm_steer.engine.front.slot_use_files import SlotUse
from vllm_steer.engine.front.slots_in_flight import InFlight
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry, Registered, bank_writes, configured_directions
from vllm_steer.errors import SettingsError, SteerError
from vllm_steer.schema.steering import Steering
from vllm_steer.server.registry.registry_folder import Index, Key, RegistryDirectory, Server

Write = Callable[[list[tuple[int, Direction]]], Awaitable[None]]
Check = Callable[[DirectionBook, DirectionBook], None]
"""Called under the lock with the book before a change and the book after it; an exception prevents the change."""


class SharedRegistry(DirectionBook):
    """One process's view of the registry.

    Args:
        directory: the files that all processes share.
        server: the server they belong to.
        capacity: slots of the bank.
        hidden_size: D; every vector must have this length.
        write: writes vectors into slots of the bank, on all workers.
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
        self._slots: frozenset[int] = frozenset()
        self._uploaded: frozenset[Key] = frozenset()
        self._files: Mapping[Key, str] = {}
        self._aliases: Mapping[str, tuple[Steering, ...]] = {}
        self._last_server = ""

    async def start(self, configured: Sequence[Direction]) -> None:
        """Join the other processes of the server, or be the first. Await it before serving any request.

        Args:
            configured: the directions of the configured files, which the workers wrote at start-up.

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
            self.directory.forget_readouts()
            files = DirectionRegistry(self.capacity, self.hidden_size)
            files.register(configured)
            # An upload replaces a file's direction of the same name and layer, and may have its slot.
            rest = [one for one in files.all() if _key(one) not in self._uploaded]
            draft = DirectionRegistry(self.capacity, self.hidden_size, rest)
            uploaded = self.load_vectors([one for one in self._book.all() if _key(one) in self._uploaded])
            try:
                writes = draft.register(uploaded)
            except SteerError as error:
                raise type(error)(f"registry_dir {self.directory.path}: {error}") from None
            saved = self.directory.save_vectors(configured)
            if writes:
                await self._write(writes)
            self._publish(draft, self._uploaded, {**saved, **{key: self._files[key] for key in self._uploaded}})

    def current(self) -> DirectionBook:
        """The book as last published by any process; the same object until something changes."""
        version = self.directory.version()
        # If the folder is removed under a running server, the bank and the book stay as they are.
        if version is not None and version != self._version:
            self._load()
        return self._book

    def find(self, name: str, layer: int | None, hooked: Collection[int]) -> Registered:
        """See ``DirectionBook.find``; uses the current book."""
        return self.current().find(name, layer, hooked)

    def layers_of(self, name: str) -> dict[int, Registered]:
        """See ``DirectionBook.layers_of``; uses the current book."""
        return self.current().layers_of(name)

    def all(self) -> Iterable[Registered]:
        """See ``DirectionBook.all``; uses the current book."""
        return self.current().all()

    def aliases(self) -> Mapping[str, tuple[Steering, ...]]:
        """Model name -> entries of the aliases put over HTTP; the same object until something changes."""
        self.current()
        return self._aliases

    def load_vectors(self, registered: Sequence[Registered]) -> list[Direction]:
        """Read the vectors of registered directions.

        Raises:
            BadDirectionFile: a file is missing or damaged, or a direction has been replaced or removed meanwhile.
        """
        return self.directory.load_vectors(registered, self._files)

    async def put_alias(self, name: str, entries: tuple[Steering, ...], check: Callable[[], None]) -> bool:
        """Make ``name`` an alias, or give it other entries.

        Args:
            name: the model name.
            entries: what it stands for.
            check: called under the lock, so no direction is removed meanwhile; an exception prevents the change.

        Returns:
            Whether the name is new.

        Raises:
            Exception: any exception of ``check``.
        """
        async with self.directory.locked():
            before = self.aliases()
            check()
            self._publish(self._book, self._uploaded, self._files, {**before, name: entries})
            return name not in before

    async def remove_alias(self, name: str) -> bool:
        """Remove an alias that was put over HTTP; whether there was one."""
        async with self.directory.locked():
            before = self.aliases()
            if name not in before:
                return False
            kept = {one: its for one, its in before.items() if one != name}
            self._publish(self._book, self._uploaded, self._files, kept)
            return True

    async def put(self, directions: Sequence[Direction], check: Check) -> DirectionBook:
        """Register all directions or none, and return the new book.

        Raises:
            WrongDimension: a vector's length is not the hidden size.
            BankFull: there is no free slot.
            Exception: any exception of ``check``.
        """
        async with self.directory.locked():
            before = self.current()
            draft = DirectionRegistry(self.capacity, self.hidden_size, before, self.use.busy())
            writes = draft.register(directions)
            check(before, draft)
            uploaded = self._uploaded | {_key(direction) for direction in directions}
            files = self._files
            if writes:
                files = {**files, **self.directory.save_vectors([direction for _, direction in writes])}
                await self._write(writes)
            if writes or uploaded != self._uploaded:
                self._publish(draft, uploaded, files)
            return self.current()

    async def remove(self, name: str, layer: int | None, check: Check) -> list[Registered]:
        """Remove a name, at one layer or at all, and return its directions.

        A direction from a configured file is registered again at a restart.

        Raises:
            UnknownDirection: the name is not registered, or not at this layer.
            Exception: any exception of ``check``.
        """
        async with self.directory.locked():
            before = self.current()
            draft = DirectionRegistry(self.capacity, self.hidden_size, before)
            removed = draft.remove(name, layer)
            check(before, draft)
            self._publish(draft, self._uploaded - {_key(one) for one in removed}, self._files)
            return removed

    def show_bank(self) -> tuple[int, int, int]:
        """Numbers of slots that are registered, held only by running requests, and free; also sets the metric."""
        self.current()
        registered = self._slots
        held = len(self.use.busy() - registered)
        slots = (len(registered), held, self.capacity - len(registered) - held)
        metrics.bank(*slots)
        return slots

    def released(self, slots: Iterable[int]) -> None:
        """Update the metric; call it when requests that used these slots have ended."""
        if not self._slots.issuperset(slots):
            self.show_bank()

    def close(self) -> None:
        """Leave the registry and free the slots of this process."""
        self.use.close()
        if self._index_file is not None:
            self._index_file.close()

    def _publish(
        self,
        draft: DirectionBook,
        uploaded: frozenset[Key],
        files: Mapping[Key, str],
        aliases: Mapping[str, tuple[Steering, ...]] | None = None,
    ) -> None:
        kept = self._aliases if aliases is None else aliases
        registered = tuple(draft.all())
        index = Index(self._server.name, registered, uploaded, kept, {key: files[key] for key in map(_key, registered)})
        self.directory.publish(index)
        self._adopt(self.directory.open_index(), index, draft)  # the lock is held, so the file is ours
        self.show_bank()

    def _load(self) -> None:
        file = self.directory.open_index()
        try:
            index = Index.read(file)
        except SettingsError:
            file.close()
            raise
        self._adopt(file, index, DirectionBook(index.registered))

    def _adopt(self, file: IO[str], index: Index, book: DirectionBook) -> None:
        """Take over an index; ``file`` is open on it, and ``book`` holds its directions and changes no more."""
        if self._index_file is not None:
            self._index_file.close()
        # Kept open, so that no later index gets its inode and with it the same version.
        self._index_file = file
        status = os.fstat(file.fileno())
        self._version = status.st_dev, status.st_ino
        self._book, self._uploaded, self._last_server = book, index.uploaded, index.server
        self._slots, self._files = frozenset(book.slots()), index.files
        if index.aliases != self._aliases:
            self._aliases = index.aliases


def _key(one: Direction | Registered) -> Key:
    return one.name, one.layer


async def share_registry(admission: Admission, engine_client: Any) -> SharedRegistry:
    """Make ``admission`` use the registry that all API server processes share.

    Each process awaits it before it serves any request.

    Args:
        admission: the admission of this process.
        engine_client: vLLM's ``AsyncLLM``.

    Raises:
        SettingsError, SteerError: as ``SharedRegistry.start``.
    """

    async def write(writes: list[tuple[int, Direction]]) -> None:
        for message in bank_writes(writes):
            await call_workers(engine_client, "vllm_steer_write", *message)

    config, settings = engine_client.vllm_config, admission.settings
    server = Server.of(config.parallel_config._api_process_count)
    if settings.registry_dir is None:
        directory = RegistryDirectory.private(server)
        atexit.register(directory.remove_if_unused)
    else:
        directory = RegistryDirectory(Path(settings.registry_dir))
    registry = SharedRegistry(directory, server, settings.max_directions, config.model_config.get_hidden_size(), write)
    atexit.register(registry.close)  # runs before remove_if_unused: atexit goes backwards
    await registry.start(configured_directions(settings))
    # The engine answers a process's messages in order, so an answer to is_sleeping means that all before are handled.
    admission.in_flight = InFlight(registry.use, engine_client.is_sleeping, registry.released)
    admission.registry = registry
    return registry
