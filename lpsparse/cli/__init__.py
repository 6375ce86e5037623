"""The command line: build a step, call its function, show the result. The only place that prints or exits."""

import gc

gc.disable()  # while modules are imported there is no garbage: that is a tenth of the time of `--help`
try:
    from lpsparse.cli.main import main
finally:
    gc.enable()

__all__ = ["main"]
