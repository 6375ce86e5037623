"""Report progress in phases of bytes, steps or rows to the one listener of a process, its command line."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lpsparse.parallel.threads import share_of_rank


@dataclass(frozen=True, slots=True)
class Position:
    """Progress of a phase."""

    what: str  # is done
    unit: str  # of `done` and `total`: bytes, steps, rows; HASHED are bytes that are hashed beside other work
    done: int
    total: int
    facts: tuple[str, ...] = ()  # what else is known, what matters most first


class Brief(str):
    """A message in one line, and what `--verbose` says in its place."""

    full: str

    def __new__(cls, text: str, full: str) -> "Brief":
        found = super().__new__(cls, text)
        found.full = full
        return found


HASHED = "bytes hashed"
Listener = Callable[[Position | None], None]  # None: the phase is over

_lock = threading.Lock()
_listener: Listener | None = None
_now: Position | None = None


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
def phase(what: str, total: int, unit: str = "bytes", *, done: int = 0) -> Generator[None]:
    """Work on `total` units, `done` of them done before; a nested phase is a part of the outer one. Bytes are
    divided among the ranks of a job."""
    global _now
    if _now is not None:
        yield
        return
    _now = Position(what, unit, done, share_of_rank(total) if unit.startswith("bytes") else total)
    advance(0, unit)
    try:
        yield
    finally:
        with _lock:
            _now = None
            if _listener is not None:
                _listener(None)


def advance(
    amount: int, unit: str = "bytes", *, what: str | None = None, facts: tuple[str, ...] | None = None
) -> None:
    """Add `amount` units to the phase, if it counts in this unit. `what` and `facts` replace the phase's."""
    global _now
    with _lock:
        if _now is None or _now.unit != unit:
            return
        done = min(_now.done + amount, _now.total)
        facts = _now.facts if facts is None else facts
        _now = replace(_now, what=what or _now.what, done=done, facts=facts)
        if _listener is not None:
            _listener(_now)
