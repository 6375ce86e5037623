"""How far the work on a checkpoint is, in bytes, told to whoever listens. A process has one listener, its
command line."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lpsparse.checkpoint.threads import share_of

Listener = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all

_lock = threading.Lock()
_listener: Listener | None = None
_phase: tuple[str, int] | None = None  # what, and bytes in all
_done = 0


@contextmanager
def told_to(listener: Listener) -> Generator[None]:
    """Tell `listener` of the phases inside. It is called from many threads, one at a time."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


@contextmanager
def phase(what: str, nbytes: int) -> Generator[None]:
    """Work on so many bytes; within another phase it is a part of that one."""
    global _phase, _done
    if _phase is not None:
        yield
        return
    _phase, _done = (what, share_of(nbytes)), 0
    advance(0)
    try:
        yield
    finally:
        _phase = None


def advance(nbytes: int) -> None:
    """So many more bytes of the phase are done."""
    global _done
    with _lock:
        _done += nbytes
        if _listener is not None and _phase is not None:
            _listener(_phase[0], min(_done, _phase[1]), _phase[1])
