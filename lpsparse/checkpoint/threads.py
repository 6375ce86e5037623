"""Work on all cores: numpy and hashlib let other threads run while they compute."""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_count: ContextVar[int | None] = ContextVar("threads", default=None)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def using(count: int | None) -> Generator[None]:
    """With `count` threads, None being one a core."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


def parallel(function: Callable[[A], B], items: Iterable[A], *, waiting: int = 0) -> list[B]:
    """`function` of each item, in their order; the first error, in that order, is raised. Inside of such a
    function the threads are taken already, and it is a plain loop. `waiting` more threads where many of them
    wait for a disk."""
    work = list(items)
    given = _count.get()
    count = min(given if given == 1 else (given or cores()) + waiting, len(work))
    if count < 2:
        return [function(item) for item in work]
    with ThreadPoolExecutor(count, initializer=lambda: _count.set(1)) as pool:
        try:
            return list(pool.map(function, work))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def beside(function: Callable[[], B]) -> Generator[Callable[[], B]]:
    """Begin with `function` beside the block; a call waits for what it gives, or raises its error."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(copy_context().run, function).result
