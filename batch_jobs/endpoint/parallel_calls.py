"""Runs slow calls in a bounded number of threads and yields each result as soon as it is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_calls(
    call: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, call(item)) in order of completion, with `workers` calls in flight at a time.

    Items are taken as threads become free, so a long iterable takes no memory. After a call raises, no new one starts,
    the results of those in flight are still yielded (they may have been paid for), and then the first error is raised.
    """
    source = iter(items)
    failure: BaseException | None = None
    under_way: dict[Future[Result], Item] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            free = 0 if failure else workers - len(under_way)
            under_way |= {pool.submit(call, item): item for item in islice(source, free)}
            if not under_way:
                break
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                item = under_way.pop(future)
                if error := future.exception():
                    failure = failure or error
                else:
                    yield item, future.result()
    if failure:
        raise failure
