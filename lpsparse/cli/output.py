"""What a person sees: results on stdout, everything else on stderr;
bars on a terminal, plain lines elsewhere."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from lpsparse.errors import OutputError
from lpsparse.reporting.text import clean
from lpsparse.settings import is_first


def print_result(text: str) -> None:
    """Print on stdout; a reader that has gone away (`| head -1`) is no error."""
    if is_first():
        _write(sys.stdout, text)


def tell(text: str) -> None:
    """Say on stderr; work goes on when its reader has gone away."""
    _write(sys.stderr, text)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # it was closed before we began
        return
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        silence(stream)
    except OSError as error:
        silence(stream)
        if stream is sys.stdout:
            mend = "mend the disk that it goes to; OUT, if there is one, is whole"
            raise OutputError(411, f"stdout: {error.strerror}", mend=mend) from error


def silence(stream: TextIO) -> None:
    """Send what is still to come nowhere, so that Python does not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(value: Any) -> None:
    # ASCII: a tensor's name may hold characters that a terminal obeys.
    print_result(json.dumps(value, indent=1, allow_nan=False))


def teller(quiet: bool) -> Callable[[str], None]:
    """A function that says one message on stderr, or nothing when quiet."""

    def say(text: str) -> None:
        if not quiet and is_first():
            tell(clean(text))

    return say


def width() -> int:
    """Columns of the terminal; no limit where there is none, so that names in files and pipes are whole."""
    if (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ:
        return shutil.get_terminal_size((100, 24)).columns
    return 100_000


class TrainingBar:
    """Progress of a training run: a bar on a terminal,
    a line every 15 seconds elsewhere. Give `update` to a verb."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or not is_first()
        self.live = not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: Any = None
        self._task: Any = None
        self._said = self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, progress: Any) -> None:
        if self.quiet:
            return
        facts = (
            f"loss {progress.loss:.4f}  lr {progress.lr:.1e}  lambda {progress.lambda_p:.1e}  "
            f"zero {100 * progress.sparsity:.1f} %"
        )
        if self.live:
            self._draw(progress, facts)
        elif time.monotonic() - self._said >= 15 or progress.step == progress.steps:
            self._said = time.monotonic()
            seconds = self._said - self._started
            tell(f"step {progress.step}/{progress.steps}  {facts}  {seconds:.0f} s")
        if progress.step == progress.steps:
            self._close()

    def _draw(self, progress: Any, facts: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (MofNCompleteColumn(), BarColumn(bar_width=8), TextColumn("{task.description}"))
            self._bar = Progress(
                *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.steps)
        self._bar.update(self._task, completed=progress.step, description=facts)
