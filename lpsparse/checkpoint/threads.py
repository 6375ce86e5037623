"""Work on all cores: numpy and hashlib let other threads run while they compute."""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from threading import Event
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_stop: ContextVar[Event | None] = ContextVar("stop", default=None)
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
    stop = Event()

    def begin() -> None:
        _count.set(1)
        _stop.set(stop)

    with ThreadPoolExecutor(count, initializer=begin) as pool:
        try:
            return list(pool.map(function, work))
        except BaseException:  # Ctrl-C, too: the others end with the block that they read
            stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check_going_on() -> None:
    """Raises CancelledError on a thread of `parallel` whose work has become useless."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise CancelledError


@contextmanager
def beside(function: Callable[[], B]) -> Generator[Callable[[], B]]:
    """Begin with `function` beside the block; a call waits for what it gives, or raises its error."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(copy_context().run, function).result
