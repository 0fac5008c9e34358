"""The folder in which the API server processes of one server agree on what is registered.

::

    index.json        what lies in which slot; a new file for every change, so a reader sees all of it or none
    lock              held while one process changes something
    vectors/          one safetensors file a direction
    use/              the slots that requests of each living process use (``vllm_steer.engine.front.slot_use``)

A configured folder outlives its server: the next one registers again what clients had registered. Without one there is
a private folder that goes with the last process of its server.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]  # vLLM depends on it; its stubs are a package of their own

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.engine.front.slot_use import SlotUse
from vllm_steer.engine.registry import Registered
from vllm_steer.errors import SettingsError

_LOCK_POLL_SECONDS = 0.005
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, the same for all its API server processes and for no other server.

    Attributes:
        pid: the process that started the server.
        started: when that process started, in seconds since the epoch; a pid alone is used again.
    """

    pid: int
    started: float

    @classmethod
    def of(cls, processes: int) -> Server:
        """The server that this process belongs to.

        Args:
            processes: API server processes. One is the server itself; several are children of the one that runs
                ``vllm serve`` (vllm/v1/utils.py, ``APIServerProcessManager``).
        """
        pid = os.getppid() if processes > 1 else os.getpid()
        return cls(pid, psutil.Process(pid).create_time())

    @property
    def is_alive(self) -> bool:
        try:
            return bool(psutil.Process(self.pid).create_time() == self.started)
        except psutil.NoSuchProcess:
            return False

    @property
    def name(self) -> str:
        return f"{self.pid}-{self.started}"


@dataclass(frozen=True, slots=True)
class Index:
    """What ``index.json`` says.

    Attributes:
        server: name of the server whose bank the slots are of.
        registered: all directions.
        uploaded: (name, layer) of those that came over HTTP; the others come from the configured files.
    """

    server: str
    registered: tuple[Registered, ...]
    uploaded: frozenset[tuple[str, int]]

    def write(self, file: IO[str]) -> None:
        entries = [
            {**asdict(one), "uploaded": (one.name, one.layer) in self.uploaded, "file": _file_name(one)}
            for one in self.registered
        ]
        json.dump({"format": _FORMAT, "server": self.server, "directions": entries}, file, indent=1)

    @classmethod
    def read(cls, file: IO[str]) -> Index:
        """
        Raises:
            SettingsError: the file is not what ``write`` writes.
        """
        try:
            told = json.load(file)
            names = [field.name for field in fields(Registered)]
            entries = told["directions"]
            return cls(
                server=told["server"],
                registered=tuple(Registered(**{name: entry[name] for name in names}) for entry in entries),
                uploaded=frozenset((entry["name"], entry["layer"]) for entry in entries if entry["uploaded"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{file.name} is no index of directions ({error!r}); give another registry_dir, or remove this one."
            ) from None


class RegistryDirectory:
    """The files of one registry.

    Args:
        path: the folder; made where there is none.

    Raises:
        SettingsError: the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.use = path / "use"
        self._index = path / "index.json"
        self._vectors = path / "vectors"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.use.mkdir(exist_ok=True)
            self._vectors.mkdir(exist_ok=True)
        except OSError as error:
            raise SettingsError(f"registry_dir {path} cannot be used ({error}); give a folder to write in.") from None

    @classmethod
    def private(cls, server: Server) -> RegistryDirectory:
        """The folder of a server that is configured with none; what dead servers left behind is removed.

        Raises:
            SettingsError: another user was there first.
        """
        prefix = f"vllm-steer-server-{os.getuid()}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            named = re.fullmatch(r"(\d+)-(\d+\.\d+)", left.name.removeprefix(prefix))
            # Uses that are locked are alive whatever the pids say, which other containers count for themselves.
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
        """Remove the folder unless a living process has its uses in it."""
        if not SlotUse.living(self.use):
            shutil.rmtree(self.path, ignore_errors=True)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Change something alone, among all tasks of all processes. The event loop goes on while this waits."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try_lock(descriptor):
                await asyncio.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)  # unlocks

    def version(self) -> tuple[int, int] | None:
        """Device and inode of the index; None where there is none.

        While somebody has ``open_index`` open, no later index has the same: the inode is not given out again.
        """
        try:
            status = os.stat(self._index)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def open_index(self) -> IO[str]:
        """The index as it is now, for ``Index.read``.

        Raises:
            FileNotFoundError: nothing was ever published here.
        """
        return self._index.open(encoding="utf-8")

    def publish(self, index: Index) -> None:
        """Replace the index, at once for all who read it, and remove the vectors that it does not name."""
        descriptor, temporary = tempfile.mkstemp(dir=self.path, prefix=".index.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                index.write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._index)
        finally:
            Path(temporary).unlink(missing_ok=True)
        named = {_file_name(one) for one in index.registered}
        for path in self._vectors.iterdir():
            if path.name not in named:
                path.unlink(missing_ok=True)

    def save_vectors(self, directions: Iterable[Direction]) -> None:
        """Write vectors, to be there before the index names them."""
        for direction in directions:
            save_directions(self._vectors / _file_name(direction), [direction])

    def load_vector(self, one: Registered) -> Direction:
        """The vector of a registered direction.

        Raises:
            BadDirectionFile: its file is gone or damaged.
        """
        (direction,) = load_directions(self._vectors / _file_name(one))
        return direction


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _file_name(one: Direction | Registered) -> str:
    """Names may hold characters that file systems do not take, so a digest stands for them."""
    return sha256(f"{one.name}@{one.layer}:{one.content_hash}".encode()).hexdigest()[:32] + ".safetensors"
