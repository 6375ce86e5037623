"""What a person sees: results on stdout, everything else on stderr;
bars on a terminal, plain lines elsewhere."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from lpsparse.cli import github
from lpsparse.errors import OutputError
from lpsparse.launch import is_first
from lpsparse.reporting.text import IN_JSON, clean, fitted, harmless, percent, size, without_order

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report

_SILENCE = 15.0  # seconds between lines of progress
_BLINK = 0.1  # seconds between two looks of a bar
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt(3)


def print_result(text: str) -> None:
    """Print on stdout, at most as wide as the terminal is; a reader that has gone away (`| head -1`) is no
    error."""
    if is_first():
        _tell_person(sys.stdout, fitted(text, width()))


def print_text(text: str) -> None:
    """Print paragraphs and lists to be read, in pipes too at most 80 columns wide."""
    for line in text.split("\n"):
        print_result(fitted(line, min(width(), 80), hang=0 if line.lstrip()[:1].isalpha() else 2))


def print_file(text: str) -> None:
    """A whole file on stdout, as it is."""
    if is_first():
        _write(sys.stdout, text.removesuffix("\n"))


def tell(text: str) -> None:
    """Say on stderr; work goes on when its reader has gone away."""
    _tell_person(sys.stderr, text)


def _tell_person(stream: TextIO | None, text: str) -> None:
    _write(stream, harmless(text) if github.is_runner() else text)


def tell_runner(report: "Report") -> None:
    """On GitHub Actions: a summary, and an annotation for each budget that failed."""
    if is_first():
        _tell_runner(github.summarise(report), lambda: github.annotations(report))


def tell_runner_of_sweep(found: dict[str, Any]) -> None:
    """Likewise: the table, and an annotation where no model meets the budgets."""
    if is_first():
        _tell_runner(github.summarise_sweep(found), lambda: github.sweep_annotations(found))


def tell_runner_error(code: str, what: str, hint: str) -> None:
    """On GitHub Actions: what ended the command, in the summary and as an error, where a person looks."""
    line = github.command("error", f"lpsparse: {code}", what, f"hint: {hint}")
    _tell_runner(github.summarise_error(code, what, hint), lambda: [line])


def _tell_runner(wrong: str | None, annotations: Callable[[], list[str]]) -> None:
    """`wrong` is what became of the summary, if anything did."""
    if wrong is not None:
        tell(f"warning: {clean(wrong)}")
    if github.is_runner():
        for line in annotations():
            _write(sys.stderr, line)


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
            hint = "fix the disk that it goes to; OUT, if there is one, is whole"
            raise OutputError(411, f"stdout: {error.strerror}", hint=hint) from error


def silence(stream: TextIO) -> None:
    """Send what is still to come nowhere, so that Python does not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(value: Any) -> None:
    # ASCII: a tensor's name may hold characters that a terminal obeys.
    print_file(as_data(json.dumps(value, indent=1, allow_nan=False)))


def as_data(text: str) -> str:
    """The same JSON, without what GitHub's runner would obey: strings alone can hold it."""
    return without_order(text, IN_JSON)


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


def has_color() -> bool:
    """Whether stdout can show colours, and may (https://no-color.org)."""
    dumb = os.environ.get("TERM") == "dumb" or bool(os.environ.get("NO_COLOR"))
    return sys.stdout is not None and sys.stdout.isatty() and not dumb


def has_terminal() -> bool:
    """Whether stderr can show what moves."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Bar:
    """Progress: a bar on a terminal, a line every 15 seconds elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or not is_first()
        self.live = not self.quiet and has_terminal()
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

    def _is_due(self) -> bool:
        """Whether it is time for a line; seconds since the start are then `_said - _started`."""
        if time.monotonic() - self._said < _SILENCE:
            return False
        self._said = time.monotonic()
        return True

    def _draw(self, columns: tuple[Any, ...], done: int, total: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("")
        self._bar.update(self._task, completed=done, total=total, description=text)


class ByteBar(_Bar):
    """Progress on a checkpoint, in bytes. Its `update` listens to `checkpoint.progress`."""

    _drawn = 0.0
    _what = ""

    def update(self, what: str, done: int, total: int) -> None:
        if what != self._what or not done:
            self._what, self._started = what, time.monotonic()
        if self.live:
            if time.monotonic() - self._drawn < _BLINK and done < total:
                return
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

            self._drawn = time.monotonic()
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=8), DownloadColumn())
            self._draw((*columns, TimeRemainingColumn()), done, total, what)
        elif not self.quiet and self._is_due():
            left = (self._said - self._started) * (total - done) / max(done, 1)
            guess = f", about {left:.0f} s left" if done else ""
            tell(f"{what}: {size(done)} of {size(total)}{guess}")


@contextmanager
def working(quiet: bool) -> Generator[None]:
    """What a command does on a checkpoint: shared among processes, and its progress shown."""
    from lpsparse.checkpoint.progress import told_to
    from lpsparse.verbs import together

    _keep_freed_memory()
    with together(), ByteBar(quiet) as bar, told_to(bar.update):
        yield


def _keep_freed_memory() -> None:
    """Have malloc keep what arrays of megabytes give back: each of millions of pages that it returns and asks
    for again is a fault. 7 % of the time of `prune` (docs/experiments.md). All threads share what is kept:
    each with its own would keep 15 to 25 MiB more. A command's process alone: a program that calls our
    functions has memory of its own to think of."""
    import ctypes  # which --help can do without

    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(_ARENA_MAX, 1)


class TrainingBar(_Bar):
    """Progress of a training run, in steps. Give `update` to a verb."""

    def update(self, progress: Any) -> None:
        if self.quiet:
            return
        facts = (
            f"loss {progress.loss:.4f}  lr {progress.lr:.1e}  lambda {progress.lambda_p:.1e}  "
            f"zero {percent(progress.sparsity)}"
        )
        ends = progress.step == progress.steps
        if self.live:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

            columns = (MofNCompleteColumn(), BarColumn(bar_width=8), TextColumn("{task.description}"))
            self._draw((*columns, TimeRemainingColumn()), progress.step, progress.steps, facts)
        elif self._is_due() or ends:
            seconds = time.monotonic() - self._started
            tell(f"step {progress.step}/{progress.steps}  {facts}  {seconds:.0f} s")
        if ends:
            self._close()
