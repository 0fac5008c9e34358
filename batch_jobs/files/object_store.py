"""Files in an object store, or in any other file system that pyarrow opens by an address: s3, gs, abfs, hdfs.

An object appears whole or not at all, and every refusal of the store is one line that names the object. Credentials
come from where pyarrow finds them: the environment, the user's files, the machine's role. What an address says about
them is never shown.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar
from urllib.parse import parse_qs, unquote

import pyarrow as pa
from pyarrow import fs

from batch_jobs.errors import StudyError

RETRY_SECONDS: Final = (1.0, 4.0, 15.0)
"""Waits before another try of a call that a busy or unreachable store refused, on top of pyarrow's own retries."""
PARALLEL_CALLS: Final = 16
"""A store answers a call after some 10 to 100 ms, whatever its size, so many small files are moved at a time."""

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_IN_COMMAND = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
_PUBLISH_AT_CLOSE = ("s3", "gcs", "abfs")
"""File systems whose objects appear when the stream is closed; in others a file grows in its place."""
_REQUEST_ID = re.compile(r"\s*\(Request ID: [^)]*\)")
# What pyarrow's texts say of a refusal that another try would meet again. It raises a plain OSError for all of them.
_FINAL = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_SIGNATURE|UNRECOGNIZED_CLIENT|NO_SUCH_BUCKET"
    r"|INVALID_BUCKET|MISSING_AUTHENTICATION_TOKEN|EXPIRED_TOKEN|ExpiredToken|VALIDATION|HTTP status 4(?!08|29)\d\d"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|HTTP status code 4(?!08|29)\d\d|Permission denied"
)
_S3_FIELDS = ("region", "scheme", "endpoint_override", "tls_ca_file_path")
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class StoreError(StudyError):
    """An object store cannot be used; the message names the address, the store's reason and what to do."""


class Stored(NamedTuple):
    """State of a stored file, to see whether it was changed."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change by the store's clock, in nanoseconds; stores keep it to the second."""


def is_address(place: str) -> bool:
    """Whether `place` is an address (`scheme://…`) and not a path."""
    return _ADDRESS.fullmatch(place) is not None


def shown_address(address: str) -> str:
    """The address without its user, its password and its query, any of which may hold a secret or name a host."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return address
    scheme = match["scheme"].lower()
    user, rest = _user_and_rest(scheme, match["rest"].partition("?")[0])
    # abfs://container@account…: there, what stands before the @ is no user
    kept = f"{user.partition(':')[0]}@" if user and scheme in ("abfs", "abfss") else ""
    return f"{scheme}://{kept}{rest.rstrip('/')}"


def without_secrets(command: str) -> str:
    """The text of a command with every address in it as `shown_address` gives it."""
    return _IN_COMMAND.sub(lambda found: shown_address(found.group()), command)


@dataclass(frozen=True)
class StorePath:
    """A file or folder in a store; can be sent to other processes, which find their credentials themselves.

    Has the few methods of `pathlib.Path` that are needed, under the same names.
    """

    filesystem: fs.FileSystem
    path: str
    """Path in the file system: bucket and key."""
    shown: str
    """Address to show; holds no secret."""

    @classmethod
    def parse(cls, address: str) -> StorePath:
        """The place of an address, e.g. `s3://bucket/prefix` or `s3://bucket/prefix?endpoint_override=…&scheme=http`.

        Raises:
            StoreError: the address is malformed, of an unknown scheme, names no folder, or holds a password; or the
                store, asked for the bucket's region, does not answer.
        """
        shown = shown_address(address)
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise StoreError(f"{shown!r} is no address; give scheme://bucket/folder, e.g. s3://bucket/runs/demo.")
        if ":" in _user_and_rest(match["scheme"].lower(), match["rest"].partition("?")[0])[0]:
            raise StoreError(
                f"{shown}: the address holds a password, which would land in logs and in the shell's history; set the "
                "store's environment variables instead, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        bucket, _, folder = shown.partition("://")[2].partition("/")
        if not folder:
            example = f"{match['scheme']}://{bucket or 'bucket'}/runs/demo"
            raise StoreError(f"{shown} names no folder; give one in the bucket, e.g. {example}.")
        try:
            filesystem, path = (
                _s3(match["rest"]) if match["scheme"].lower() == "s3" else fs.FileSystem.from_uri(address)
            )
        except OSError as error:
            reason = _reason(error)
            raise StoreError(f"{shown} cannot be opened: {reason}; {_advice(_is_final(error, reason))}.") from error
        except (pa.ArrowException, ValueError) as error:
            reason = str(error).replace(address, shown)
            raise StoreError(
                f"{shown}: not an address that pyarrow opens ({reason}); give s3://, gs://, abfs:// or hdfs:// with a "
                "bucket and a folder."
            ) from None
        return cls(filesystem, path.rstrip("/"), shown)

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self.filesystem, f"{self.path}/{name}", f"{self.shown}/{name}")

    def __str__(self) -> str:
        return self.shown

    @property
    def name(self) -> str:
        """The last piece of the path."""
        return self.path.rpartition("/")[2]

    def exists(self) -> bool:
        """Whether there is such a file.

        Raises:
            StoreError: the store refuses.
        """
        return self.state() is not None

    def state(self) -> Stored | None:
        """Size and time of the file; None if there is none.

        Raises:
            StoreError: the store refuses.
        """
        info = self._call("looked up", lambda: self.filesystem.get_file_info(self.path))
        return _stored(info) if info.type == fs.FileType.File else None

    def files(self) -> dict[str, Stored]:
        """All files below this folder: path relative to it -> state. Empty where there is no folder.

        Raises:
            StoreError: the store refuses; that a bucket is absent is a refusal too.
        """
        # Not with allow_not_found: pyarrow then answers for a bucket that does not exist as for an empty one.
        selector = fs.FileSelector(self.path, recursive=True)
        try:
            found = self._call("listed", lambda: self.filesystem.get_file_info(selector))
        except FileNotFoundError:
            return {}
        below = len(self.path) + 1
        return {info.path[below:]: _stored(info) for info in found if info.type == fs.FileType.File}

    def read_bytes(self) -> bytes:
        """The content.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: the store refuses.
        """

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path) as file:
                return bytes(file.read())

        return self._call("read", read)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content as text; raises as `read_bytes`."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Make or replace the file in one step: other readers see the old content or the whole new one.

        Raises:
            StoreError: the store refuses; what was there before is unchanged.
        """
        if self.filesystem.type_name in _PUBLISH_AT_CLOSE:
            self._call("written", lambda: self._fill(self.path, content))
            return
        folder = self.path.rpartition("/")[0]
        unfinished = f"{folder}/.{self.name}.{uuid.uuid4().hex}.tmp"

        def replace() -> None:
            self.filesystem.create_dir(folder, recursive=True)
            self._fill(unfinished, content)
            self.filesystem.move(unfinished, self.path)

        self._call("written", replace)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file.

        Raises:
            FileNotFoundError: there is none, and `missing_ok` is false.
            StoreError: the store refuses.
        """
        try:
            self._call("deleted", lambda: self.filesystem.delete_file(self.path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _fill(self, path: str, content: bytes) -> None:
        # One call with the whole content, and nothing else inside the block: on leaving it pyarrow publishes what was
        # written so far, after an exception too. A write of the whole that fails makes the close fail.
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _call(self, done: str, call: Callable[[], _Result]) -> _Result:
        for wait in (*RETRY_SECONDS, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except (OSError, pa.ArrowException) as error:
                reason = _reason(error)
                final = _is_final(error, reason)
                if wait is None or final:
                    raise StoreError(f"{self.shown} cannot be {done}: {reason}; {_advice(final)}.") from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def each(places: Iterable[_Item], call: Callable[[_Item], _Result]) -> list[_Result]:
    """Call for each place, several at a time; the results in the order of the places.

    Raises:
        StoreError: the first of the calls that failed; calls that had begun are finished.
    """
    with ThreadPoolExecutor(PARALLEL_CALLS) as pool:
        return list(pool.map(call, places))


def _s3(rest: str) -> tuple[fs.S3FileSystem, str]:
    """The file system and the path of an S3 address.

    Not from `FileSystem.from_uri`, which asks AWS for the bucket's region even where the environment names one, and
    tries a call that times out about thirty times, for five minutes.

    Raises:
        ValueError: the query has another field, or one twice.
        OSError: AWS does not say in which region the bucket is.
    """
    place, _, query = rest.partition("?")
    fields = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query))
    if unknown := sorted(name for name, values in fields.items() if name not in _S3_FIELDS or len(values) > 1):
        raise ValueError(f"got {', '.join(unknown)} after the ?; allowed, each once: {', '.join(_S3_FIELDS)}")
    options = {name: values[0] for name, values in fields.items()}
    path = unquote(place.rpartition("@")[2] if "@" in place.partition("/")[0] else place)
    # pyarrow looks for them in `from_uri` alone
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    has_region = "region" in options or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not has_region and "endpoint_override" not in options:
        options["region"] = fs.resolve_s3_region(path.partition("/")[0])
    return fs.S3FileSystem(**options), path


def _user_and_rest(scheme: str, rest: str) -> tuple[str, str]:
    """What stands before the @ of an address, user and password, and the rest of it."""
    host = rest.partition("/")[0]
    if "@" in host:
        end = host.rindex("@")
        return rest[:end], rest[end + 1 :]
    if (
        ":" in host and "@" in rest and scheme not in ("hdfs", "viewfs")
    ):  # a password with a slash; buckets have no port
        user, _, rest = rest.partition("@")
        return user, rest
    return "", rest


def _stored(info: fs.FileInfo) -> Stored:
    return Stored(info.size or 0, info.mtime_ns or 0)


def _reason(error: Exception) -> str:
    return _REQUEST_ID.sub("", " ".join(str(error).split()))


def _is_final(error: Exception, reason: str) -> bool:
    return isinstance(error, PermissionError) or _FINAL.search(reason) is not None


def _advice(final: bool) -> str:
    if final:
        return "check the bucket's name, and that the credentials in the environment may list, read, write and delete"
    return "what is stored stays, so run the same command again when the store answers"
