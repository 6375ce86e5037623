"""The command line: build a step, call its function, show the result. The only place that prints or exits."""

import gc

from lpsparse.cli import signals

signals.leave_at_interrupt()
gc.disable()  # while modules are imported there is no garbage: that is a tenth of the time of `--help`
try:
    from lpsparse.cli.main import main
finally:
    gc.enable()
    signals.raise_at_interrupt()

__all__ = ["main"]
