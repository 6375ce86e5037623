"""The command line: build a step, call a verb, show the result. The only place that prints or exits."""

from lpsparse.cli import early

early.begin()
try:
    from lpsparse.cli.main import main
finally:
    early.end()

__all__ = ["main"]
