"""Ctrl-C and SIGTERM: clean up at the first, leave at once at the second, and no traceback at either."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from lpsparse.errors import ExitCode, TerminatedError

if TYPE_CHECKING:
    from subprocess import Popen

asked: list[int] = []  # signals that have asked this process to end
started: "list[Popen[bytes]]" = []  # processes that are not to outlive this one
_SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar has hidden
_LEFT = (
    b"\ninterrupted twice: left at once; the input is untouched, OUT is as it was or whole; OUT.partial may "
    b"be left, which the same command takes up\n"
)


def leave_at_interrupt() -> None:
    """Until `listen` Ctrl-C ends the process where it stands: nothing has begun. A KeyboardInterrupt amid an
    import may be shown with a traceback, changed into another error, or lost."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup's stays
        _set(_leave_unbegun)


def raise_at_interrupt() -> None:
    """Python's own handling again, after `leave_at_interrupt`."""
    if signal.getsignal(signal.SIGINT) is _leave_unbegun:
        _set(signal.default_int_handler)


def _set(handler: Callable[..., object]) -> None:
    with suppress(ValueError):  # another thread than the main one imports us, and has no signals
        signal.signal(signal.SIGINT, handler)


def _leave_unbegun(*_: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\ninterrupted: nothing had begun\n")
    os._exit(ExitCode.INTERRUPT)


def listen() -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C, TerminatedError at SIGTERM; leave at a second Ctrl-C."""
    asked.clear()
    if not _is_main():
        return
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
        sys.unraisablehook = partial(_again, sys.unraisablehook)


def end_quietly(code: int) -> None:
    """From here on Ctrl-C hurries, and changes nothing: the result is out."""
    if _is_main() and signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM: clean up as for Ctrl-C, whatever is being done."""
    asked.append(number)
    raise TerminatedError


def _interrupted(number: int, frame: FrameType | None) -> None:
    if asked:
        _leave(_LEFT)
    asked.append(number)
    raise KeyboardInterrupt


def _again(before: Callable[[Any], object], lost: Any) -> None:
    """Where Python could only have shown a Ctrl-C and gone on (in a callback of its own), it comes again; so
    does what torch's launcher makes of one."""
    if isinstance(lost.exc_value, KeyboardInterrupt) and asked:
        threading.Timer(0.01, _thread.interrupt_main, (asked.pop(),)).start()
    elif isinstance(number := getattr(lost.exc_value, "sigval", None), signal.Signals):
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
    else:
        before(lost)


def _leave(text: bytes) -> None:
    for child in started:  # nothing that stands in a `finally` is done any more
        with suppress(OSError):
            child.send_signal(signal.SIGINT)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + text)
    os._exit(ExitCode.INTERRUPT)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
