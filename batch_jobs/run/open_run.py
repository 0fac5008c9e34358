"""Opens the run directory that a user names: a folder of this machine, or an address in an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from batch_jobs.run.run_directory import RunDirectory


@contextmanager
def open_run(
    place: str | Path, *, drives: bool = False, fetch: bool = True, keep_publishing: bool = False
) -> Iterator[RunDirectory]:
    """The run directory at a path or an address, such as `s3://bucket/runs/demo`.

    A run in an object store gets a working copy in the folder for temporary files, which is deleted at the end. Nothing
    of the copy is published but by `RunDirectory.publish`.

    Args:
        place: path or address.
        drives: rows or grades will be written: a second driver in the same store is refused, as long as the block runs.
        fetch: fill the copy from the store.
        keep_publishing: publish what changes every few seconds, for a file that grows. Needs `drives`.

    Raises:
        StudyError: the address is unusable, the store refuses, or another driver is at work there. Errors from the
            block name the address where they named the copy.
    """
    if isinstance(place, Path) or "://" not in place:
        yield RunDirectory(Path(place))
        return
    if place.startswith("file://"):
        yield RunDirectory(Path(unquote(urlsplit(place).path)))
        return
    from batch_jobs.files.object_store import StorePath
    from batch_jobs.run.driver_lock import DriverLock
    from batch_jobs.run.working_copy import WorkingCopy

    store = StorePath.parse(place)
    with ExitStack() as stack:
        copy = WorkingCopy(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-steer-run-"))), store)
        stack.enter_context(copy.in_messages())
        if drives:
            lock = DriverLock(store, on_beat=copy.publish) if keep_publishing else DriverLock(store)
            copy.check_held = stack.enter_context(lock).check
        run = RunDirectory(copy.folder, copy)
        if fetch:
            run.fetch()
        yield run
