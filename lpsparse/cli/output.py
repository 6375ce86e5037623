"""What a person sees: results on stdout, everything else on stderr."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lpsparse.cli import github
from lpsparse.errors import OutputError
from lpsparse.parallel.environment import is_rank_0
from lpsparse.reporting.text import IN_JSON, clean, fitted, harmless, without_order

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report


def _switch(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Reporting", show_default=False)


JSON = _switch("--json", help="Print the result as one JSON object on stdout.")
FULL = _switch("--full", help="Show every tensor, and patterns of zeros.")
QUIET = _switch("--quiet", "-q", help="Print no messages and no progress.")
VERBOSE = _switch("--verbose", "-v", help="Print messages in full.")
Json = Annotated[bool, JSON]
Quiet = Annotated[bool, QUIET]
Verbose = Annotated[bool, VERBOSE]
NoMessages = Annotated[bool, _switch("--quiet", "-q", help="Print no messages; there are none.")]


def print_result(text: str) -> None:
    """Print on stdout, at most as wide as the terminal is; a reader that has gone away (`| head -1`) is no
    error."""
    if is_rank_0():
        _tell_person(sys.stdout, fitted(text, width()))


def print_text(text: str) -> None:
    """Print paragraphs and lists to be read, in pipes too at most 80 columns wide."""
    for line in text.split("\n"):
        print_result(fitted(line, min(width(), 80), hang=0 if line.lstrip()[:1].isalpha() else 2))


def print_file(text: str) -> None:
    """A whole file on stdout, as it is."""
    if is_rank_0():
        _write(sys.stdout, text.removesuffix("\n"))


def tell(text: str) -> None:
    """Say on stderr; work goes on when its reader has gone away."""
    _tell_person(sys.stderr, text)


def _tell_person(stream: TextIO | None, text: str) -> None:
    _write(stream, harmless(text) if github.is_runner() else text)


def tell_runner(report: "Report") -> None:
    """On GitHub Actions: a summary, and an annotation for each budget that failed."""
    if is_rank_0():
        _tell_runner(github.summarise(report), lambda: github.annotations(report))


def tell_runner_of_sweep(found: dict[str, Any]) -> None:
    """Likewise: the table, and an annotation where no model meets the budgets."""
    if is_rank_0():
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
            hint = "check the disk that stdout goes to; OUT, if any, is complete"
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


@dataclass(frozen=True, slots=True)
class Voice:
    """How much a command says and shows."""

    quiet: bool = False  # no messages, no progress
    verbose: bool = False  # messages in full
    full: bool = False  # every tensor

    def say(self, text: str, *, fit: bool = True) -> None:
        """Say one message on stderr. On a terminal it is made to `fit`, with no word broken."""
        if not self.quiet and is_rank_0():
            text = clean(getattr(text, "full", text) if self.verbose else text)  # of a progress.Brief
            fit = fit and has_terminal()
            tell(fitted(text, shutil.get_terminal_size((100, 24)).columns) if fit else text)


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
