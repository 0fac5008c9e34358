"""The folder through which the API server processes of one server share the registered directions.

::

    index.json        which direction is in which slot; a new file for every change, so a reader sees all of it or none
    lock              held by the process that makes a change
    vectors/          safetensors files, one for the directions of each change; the index says which is in which
    readouts/         readouts of finished replies (``vllm_steer.server.readouts.kept_readouts``), of this server alone
    use/              the slots that requests of each living process use (``vllm_steer.engine.front.slot_use_files``)

A configured folder outlives its server: the next server registers its clients' directions again. Otherwise the server
has a private folder, which its last process removes.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import IO

import psutil

from vllm_steer.directions import Direction, save_directions
from vllm_steer.directions.files import load_some
from vllm_steer.engine.front.slot_use_files import SlotUse
from vllm_steer.engine.registry import Registered
from vllm_steer.errors import BadDirectionFile, SettingsError
from vllm_steer.schema.steering import Steering

_LOCK_POLL_SECONDS = 0.005
_FORMAT = 1
_own_servers = itertools.count()
_REGISTERED_FIELDS = tuple(one.name for one in fields(Registered))

Key = tuple[str, int]
"""Name and layer of a direction."""


@dataclass(frozen=True, slots=True)
class Server:
    """Identity of a running server: the same for all its API server processes, and different for every server.

    Attributes:
        pid: the process that started the server.
        started: start time of that process, in seconds since the epoch; a pid alone can be reused.
        number: how many servers that process had started before; each has an engine, and so a bank, of its own.
    """

    pid: int
    started: float
    number: int = 0

    @classmethod
    def of(cls, processes: int) -> Server:
        """The server that this process starts or belongs to; call it once for each.

        Args:
            processes: number of API server processes. A single one is the server itself; several are children of the
                process that runs ``vllm serve`` (vllm/v1/utils.py, ``APIServerProcessManager``).
        """
        pid = os.getppid() if processes > 1 else os.getpid()
        return cls(pid, psutil.Process(pid).create_time(), 0 if processes > 1 else next(_own_servers))

    @property
    def is_alive(self) -> bool:
        """Whether the process that started the server still runs."""
        try:
            return bool(psutil.Process(self.pid).create_time() == self.started)
        except psutil.NoSuchProcess:
            return False

    @property
    def name(self) -> str:
        """``<pid>-<started>-<number>``, for indexes and folder names."""
        return f"{self.pid}-{self.started}-{self.number}"


@dataclass(frozen=True, slots=True)
class Index:
    """The contents of ``index.json``.

    Attributes:
        server: name of the server to whose bank the slots belong.
        registered: all directions.
        uploaded: the directions registered over HTTP; the others come from the configured files.
        aliases: model name -> its entries, of the aliases put over HTTP.
        files: name of the file in ``vectors/`` that holds each direction.
    """

    server: str
    registered: tuple[Registered, ...]
    uploaded: frozenset[Key]
    aliases: Mapping[str, tuple[Steering, ...]] = field(default_factory=dict)
    files: Mapping[Key, str] = field(default_factory=dict)

    def write(self, file: IO[str]) -> None:
        """Write the index as JSON."""
        entries = [
            {
                **{name: getattr(one, name) for name in _REGISTERED_FIELDS},
                "uploaded": (one.name, one.layer) in self.uploaded,
                "file": self.files[one.name, one.layer],
            }
            for one in self.registered
        ]
        aliases = {name: [one.to_json() for one in its] for name, its in self.aliases.items()}
        told = {"format": _FORMAT, "server": self.server, "directions": entries, "aliases": aliases}
        file.write(json.dumps(told))  # without indent, and in one piece: json has a fast way for that alone

    @classmethod
    def read(cls, file: IO[str]) -> Index:
        """Read an index that ``write`` wrote.

        Raises:
            SettingsError: the file is not such an index.
        """
        try:
            told = json.load(file)
            entries = told["directions"]
            return cls(
                server=told["server"],
                registered=tuple(Registered(*[entry[name] for name in _REGISTERED_FIELDS]) for entry in entries),
                uploaded=frozenset((entry["name"], entry["layer"]) for entry in entries if entry["uploaded"]),
                # An index of an earlier version has none.
                aliases={name: tuple(map(Steering.from_json, its)) for name, its in told.get("aliases", {}).items()},
                files={(entry["name"], entry["layer"]): entry["file"] for entry in entries},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"{file.name} is no index of directions ({error!r}); give another registry_dir, or remove this one."
            ) from None


class RegistryDirectory:
    """The files of one registry.

    Args:
        path: the folder; created if it does not exist.

    Attributes:
        use: the folder for ``SlotUse``.
        readouts: the folder for ``KeptReadouts``.

    Raises:
        SettingsError: the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.use = path / "use"
        self.readouts = path / "readouts"
        self._index = path / "index.json"
        self._vectors = path / "vectors"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.use.mkdir(exist_ok=True)
            self.readouts.mkdir(exist_ok=True)
            self._vectors.mkdir(exist_ok=True)
        except OSError as error:
            raise SettingsError(f"registry_dir {path} cannot be used ({error}); give a folder to write in.") from None

    @classmethod
    def private(cls, server: Server) -> RegistryDirectory:
        """Create the private folder of a server without ``registry_dir``; removes the folders of dead servers.

        Raises:
            SettingsError: the folder cannot be made, or belongs to another user.
        """
        prefix = f"vllm-steer-server-{os.getuid()}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            named = re.fullmatch(r"(\d+)-(\d+\.\d+)-\d+", left.name.removeprefix(prefix))
            # A locked use is alive whatever the pid says, because other containers number their processes themselves.
            if named and not Server(int(named[1]), float(named[2])).is_alive and not SlotUse.living(left / "use"):
                shutil.rmtree(left, ignore_errors=True)
        directory = cls(Path(tempfile.gettempdir(), prefix + server.name))
        owner = directory.path.stat().st_uid
        if owner != os.getuid():
            raise SettingsError(
                f"{directory.path} belongs to user {owner}, not to {os.getuid()}; give a registry_dir of your own."
            )
        return directory

    def remove_if_unused(self) -> None:
        """Remove the folder unless a living process still uses it."""
        if not SlotUse.living(self.use):
            shutil.rmtree(self.path, ignore_errors=True)

    def forget_readouts(self) -> None:
        """Remove the kept readouts; the first process of a server does so."""
        for path in self.readouts.iterdir():
            path.unlink(missing_ok=True)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the lock, which one task of all processes can have. The event loop runs on while this waits."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try_lock(descriptor):
                await asyncio.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)  # unlocks

    def version(self) -> tuple[int, int] | None:
        """Device and inode of the index; None if there is none.

        While a file from ``open_index`` is open, no later index has the same version, because its inode is not reused.
        """
        try:
            status = os.stat(self._index)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def open_index(self) -> IO[str]:
        """Open the current index, for ``Index.read``.

        Raises:
            FileNotFoundError: no index has been published here.
        """
        return self._index.open(encoding="utf-8")

    def publish(self, index: Index) -> None:
        """Replace the index atomically, and remove the vectors that it does not name."""
        descriptor, temporary = tempfile.mkstemp(dir=self.path, prefix=".index.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                index.write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._index)
        finally:
            Path(temporary).unlink(missing_ok=True)
        named = set(index.files.values())
        for path in self._vectors.iterdir():
            if path.name not in named:
                path.unlink(missing_ok=True)

    def save_vectors(self, directions: Sequence[Direction]) -> dict[Key, str]:
        """Write vectors to one file; call it before publishing an index that names them.

        The file stays until the index names none of its directions.

        Returns:
            For each direction the name of the file, for ``Index.files``.
        """
        if not directions:
            return {}
        latest = {(one.name, one.layer): one for one in directions}
        file = _file_name(latest.values())
        save_directions(self._vectors / file, [*latest.values()])
        return dict.fromkeys(latest, file)

    def load_vectors(self, registered: Sequence[Registered], files: Mapping[Key, str]) -> list[Direction]:
        """Read the vectors of registered directions.

        Args:
            registered: the directions.
            files: as in ``Index``.

        Raises:
            BadDirectionFile: a file is missing or damaged, or holds other vectors.
        """
        by_file: defaultdict[str, list[Registered]] = defaultdict(list)
        for one in registered:
            by_file[files.get((one.name, one.layer), "")].append(one)
        found: dict[Key, Direction] = {}
        for file, some in by_file.items():
            read = load_some(self._vectors / file, [f"{one.name}@{one.layer}" for one in some])
            for one, direction in zip(some, read, strict=True):
                if direction.content_hash != one.content_hash:
                    raise BadDirectionFile(
                        f"{self._vectors / file} holds another vector for {direction.key!r} than the index says; "
                        "allowed: unchanged files. Register it again."
                    )
                found[one.name, one.layer] = direction
        return [found[one.name, one.layer] for one in registered]


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _file_name(directions: Iterable[Direction]) -> str:
    """A digest, because names may hold characters that file systems do not accept."""
    what = "\n".join(f"{one.name}@{one.layer}:{one.content_hash}" for one in directions)
    return sha256(what.encode()).hexdigest()[:32] + ".safetensors"
