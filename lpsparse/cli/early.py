"""While the command line is being imported Ctrl-C ends the process where it stands: nothing has begun.

A KeyboardInterrupt amid an import may be shown with a traceback, changed into another error, or lost. And no
garbage is collected meanwhile, since there is none: that is a tenth of the time of `--help`.
"""

import gc
import os
import signal
from collections.abc import Callable


def begin() -> None:
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup's stays
        _set(_leave)


def end() -> None:
    gc.enable()
    if signal.getsignal(signal.SIGINT) is _leave:
        _set(signal.default_int_handler)


def _set(handler: Callable[..., object]) -> None:
    try:
        signal.signal(signal.SIGINT, handler)
    except ValueError:
        return  # another thread than the main one imports us, and has no signals


def _leave(*_: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\ninterrupted: nothing had begun\n")
    os._exit(130)
