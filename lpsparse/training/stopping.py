"""Being asked to stop: signals and the time limit. The loop finishes its step, saves its state and leaves."""

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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
