"""How a run ends before its last step: signals, the time limit, lost memory, lost processes.

Asked to stop, the loop finishes its step, saves its state and leaves.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from lpsparse.errors import ResourceError, is_out_of_memory
from lpsparse.parallel import ranks
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.model import first_line

_LINGERS = 2.0  # seconds that the system may take to say that a process is gone
_workers: list[BaseProcess] = []  # of the loader that is read
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
ASKS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Stop:
    """What asked the run to stop: the name of a signal, `--max-time`, or nothing ("")."""

    def __init__(self, max_minutes: float | None) -> None:
        self._reason = ""
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def reason(self) -> str:
        if not self._reason and self._until is not None and time.monotonic() >= self._until:
            self._reason = "--max-time"
        return self._reason

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler. The second one does not wait for the step to end; SIGUSR1 never hurries."""
        if number == signal.SIGUSR1 and self._reason:
            return
        if self._reason in _NAMES:
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name


@contextmanager
def listening(stop: Stop) -> Generator[None]:
    """Give the signals to `stop` meanwhile; outside of the main thread there are none to be had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: list[Any] = [signal.signal(number, stop.ask) for number in ASKS]
    try:
        yield
    finally:
        for number, handler in zip(ASKS, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def guarded(step: FinetuneStep, t: int, last_state: Callable[[], int]) -> Generator[None]:
    """Raise ResourceError where step t (from 0) runs out of memory, or loses another process."""
    with ranks.lost_rank_errors(f"step {t + 1}: "):
        try:
            yield
        except (MemoryError, RuntimeError, OSError, EOFError) as error:
            if is_out_of_memory(error):
                raise _out_of_memory(step, t, has_state=last_state() > 0) from error
            if _worker_is_gone():
                _hear_no_more_of_workers()
                what = f"a worker process that prepares batches died: {first_line(error)}"
                raise ResourceError(606, what, hint="use fewer --workers, or 0") from error
            raise


def _out_of_memory(step: FinetuneStep, t: int, *, has_state: bool) -> ResourceError:
    world_size, more = ranks.world_size(), min(2 * step.accumulate, step.batch_size)
    size, half = (math.ceil(step.batch_size / (world_size * parts)) for parts in (step.accumulate, more))
    what = f"out of memory at step {t + 1}, with {size} examples at a time"
    ways = [] if step.checkpointing else ["--checkpointing"]
    ways += ["--shard"] if world_size > 1 and not step.shard else []
    hint = f"use {', '.join([*ways, 'a smaller model or more memory'])}"
    if half < size:
        hint = f"--accumulate {more} uses {half} at a time for the same step"
        hint += ", with --resume never" if has_state else ""
    return ResourceError(601, what, hint=hint)


def watch_workers(workers: list[BaseProcess]) -> None:
    """The processes of the loader that is read from now on."""
    _workers[:] = workers


def _worker_is_gone() -> bool:
    """Return whether a worker of the loader has died, so that an error is about that: torch raises one
    while it waits for it, while it fetches what that one had sent, or from a signal's handler at any
    moment."""
    gone: list[Any] = wait([each.sentinel for each in _workers], _LINGERS) if _workers else []
    for worker in _workers:
        if worker.sentinel in gone:
            worker.join(_LINGERS)
    return any(worker.exitcode for worker in _workers)


def _hear_no_more_of_workers() -> None:
    """Ignore further signals about dead workers. torch raises an error from a signal handler for each; once
    one is known, others would only interrupt the cleanup."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler):  # with what a program had set before, which torch's calls

        def quietly(number: int, frame: FrameType | None) -> None:
            with suppress(RuntimeError):
                handler(number, frame)

        signal.signal(signal.SIGCHLD, quietly)
