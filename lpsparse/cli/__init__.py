"""The command line: build a step, call a verb, show the result. The only place that prints or exits."""

from lpsparse.cli.main import main

__all__ = ["main"]
