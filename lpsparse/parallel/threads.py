"""Share work among threads (numpy and hashlib release the GIL) and among the ranks of a launched job."""

import heapq
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

_MOST_WAITING = 1024  # calls: each that waits for a thread takes as much memory as a small tensor

_stop: ContextVar[Event | None] = ContextVar("stop", default=None)
_count: ContextVar[int | None] = ContextVar("threads", default=None)
_processes: ContextVar["Processes | None"] = ContextVar("processes", default=None)


@dataclass(frozen=True, slots=True)
class Processes:
    """The ranks of a job that share work. All of them call each function."""

    number: int  # rank of this process
    count: int  # world size
    gathered: Callable[[Any], list[Any]]  # a small value of each rank, by rank
    of_first: Callable[[Callable[[], Any]], Any]  # a function's result on rank 0, or its error


def sharing_with(processes: Processes | None) -> AbstractContextManager[None]:
    """Share the work inside with other ranks; None: do all of it here."""
    return _holding(_processes, processes)


def using_threads(count: int | None) -> AbstractContextManager[None]:
    """Use `count` threads inside; None: one per core."""
    return _holding(_count, count)


@contextmanager
def _holding(variable: ContextVar[A], value: A) -> Generator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def on_rank_0(make: Callable[[], B]) -> B:
    """Run `make` on rank 0, and return its result or raise its error on every rank."""
    processes = _processes.get()
    if processes is None:
        return make()
    with sharing_with(None):
        return processes.of_first(make)


def on_every_rank(make: Callable[[], B]) -> B:
    """Run `make` on every rank, and return its result here. If it fails on any, raise that error on all."""
    processes = _processes.get()
    if processes is None:
        return make()
    found: list[B] = []  # it stays here: a checkpoint's readers cannot travel
    _from_all(processes, lambda: found.append(make()))
    return found[0]


def _from_all(processes: Processes, make: Callable[[], B]) -> list[B]:
    """Run `make` on every rank, and return all results by rank. The first rank's error is raised on all, so
    that none waits for it."""
    found: B | None = None
    error: Exception | None = None
    try:
        with sharing_with(None):
            found = make()
    except Exception as raised:
        error = raised
    shares = processes.gathered((found, error))
    for _, told in shares:
        if told is not None:
            raise error or told
    return [share for share, _ in shares]


def share_of_rank(amount: int) -> int:
    """About how much of an amount of work is done by this rank."""
    processes = _processes.get()
    return amount if processes is None else amount // processes.count


def cores() -> int:
    """Cores that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def parallel(
    function: Callable[[A], B],
    items: Iterable[A],
    *,
    waiting: int = 0,
    size: Callable[[A], float] = lambda _: 1,
) -> list[B]:
    """Apply `function` to each item on threads and return the results in order, or raise the first error.

    Nested calls get the threads that are left over, or run a plain loop. `waiting` adds threads where many
    wait for a disk. The ranks of a job each take a share of the items, by `size`; all get all results, or the
    error of the first rank that has one."""
    work = list(items)
    processes = _processes.get()
    if processes is None:
        return _on_threads(function, work, waiting)
    shares = _dealt([size(item) for item in work], processes.count)
    mine = [work[i] for i in shares[processes.number]]
    found = _from_all(processes, lambda: _on_threads(function, mine, waiting))
    by_place = {
        i: each for share, of in zip(shares, found, strict=True) for i, each in zip(share, of, strict=True)
    }
    return [by_place[i] for i in range(len(work))]


def _dealt(sizes: list[float], count: int) -> list[list[int]]:
    """Deal items to `count` ranks, the largest first, each to the one that has least. Returns places."""
    shares: list[list[int]] = [[] for _ in range(count)]
    held = [(0.0, number) for number in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, number = heapq.heappop(held)
        shares[number].append(i)
        heapq.heappush(held, (total + sizes[i], number))
    return shares


def parallel_in_order(function: Callable[[A], B], items: Iterable[A]) -> Generator[B]:
    """Apply `function` to each item on all threads, and yield the results in order, a few items ahead."""
    count = _count.get() or cores()
    if count < 2:
        yield from map(function, items)
        return
    stop, ahead = Event(), deque[Future[B]]()
    with ThreadPoolExecutor(count, initializer=_begin, initargs=(stop, 1)) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:  # also of who takes them
            stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(stop: Event, count: int) -> None:
    """Set up a thread: `count` threads for nested calls, which end when `stop` is set."""
    _count.set(count)
    _stop.set(stop)


def _on_threads(function: Callable[[A], B], work: list[A], waiting: int) -> list[B]:
    given = _count.get()
    count = min(given if given == 1 else (given or cores()) + waiting, len(work))
    if count < 2:
        return [function(item) for item in work]
    stop = Event()
    within = max(1, (given or cores()) // len(work))  # few files on many cores: some for each
    size = -(-len(work) // _MOST_WAITING)
    parts = [work[first : first + size] for first in range(0, len(work), size)]
    with ThreadPoolExecutor(count, initializer=_begin, initargs=(stop, within)) as pool:
        try:
            done = pool.map(lambda part: [function(item) for item in part], parts)
            return [found for part in done for found in part]
        except BaseException:  # Ctrl-C, too: the others end with the block that they read
            stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def check_going_on() -> None:
    """Raises CancelledError on a thread of `parallel` whose result is no longer needed."""
    stop = _stop.get()
    if stop is not None and stop.is_set():
        raise CancelledError


@contextmanager
def beside(function: Callable[[], B]) -> Generator[Callable[[], B]]:
    """Run `function` on a thread beside the block, and yield a call that waits for its result or raises its
    error. Within a job of ranks it runs when it is called: collectives have an order."""
    if _processes.get() is not None:
        yield function
        return
    stop, context = Event(), copy_context()
    context.run(_stop.set, stop)
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(context.run, function).result
        except BaseException:
            stop.set()
            raise
