"""Assemble the commands, and turn every failure into two lines and an exit code."""

import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from traceback import print_exc
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from lpsparse import __version__
from lpsparse.cli.output import silence, tell
from lpsparse.errors import ExitCode, LaunchError, LpsparseError, TerminatedError, is_out_of_memory
from lpsparse.settings import check_environment, is_first, is_one_of_several, name_as_launched

_HELP = """Make pretrained checkpoints small, and prove that they still work.

\b
  finetune  train so that most weights go to zero by themselves
  prune     cut what is near zero, exactly to a target
  pack      store the zeros as no bytes
  report    prove it: what is zero, what it costs, pass or fail

\b
Start with:
  lpsparse demo
"""
_asked: list[int] = []  # signals that have asked this process to end
_EXITS = "Exit codes: " + ", ".join(f"{int(code)} {code.name.lower()}" for code in ExitCode)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with an ExitCode."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    code: Any = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII still shows every name
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)  # training has a handler of its own
    try:
        name_as_launched()
        check_environment()
        code = _app()(args=words, prog_name="lpsparse", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPT
    except LpsparseError as error:
        if debug:
            print_exc()
        _leave_without_files(error.__cause__)
        if not isinstance(error, LaunchError):
            _say_error(error.code, error.what, error.mend)
        elif error.said:
            tell(error.said)
        _leave("", error.exit_code)
    except (BrokenPipeError, SystemExit):  # nobody reads on; SystemExit is how Typer takes it
        if sys.stdout is not None:
            silence(sys.stdout)
    except Exception as error:
        _leave_without_files(error)
        if is_out_of_memory(error):
            _say_error("LPS601", "out of memory", "close other programs, or use a smaller --batch-size")
            _leave("", ExitCode.RESOURCE)
        code = _usage(error, words)
        if code is None:
            print_exc()
            code = ExitCode.BUG
    if code == ExitCode.INTERRUPT and _asked:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # a launcher that stops its processes says why
            mend = "run the command again; it uses the weight files that `prune` and `pack` had written"
            _say_error("LPS751", "stopped by SIGTERM before the result was whole", mend)
        _leave("", ExitCode.RESUMABLE)
    if code == ExitCode.INTERRUPT:  # Typer turns Ctrl-C inside a command into this code
        _leave("interrupted: the input is untouched, no half-written OUT is left", ExitCode.INTERRUPT)
    _end(int(code) if isinstance(code, int) else 0)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM: clean up as for Ctrl-C, whatever is being done."""
    _asked.append(number)
    raise TerminatedError


def _leave_without_files(error: BaseException | None) -> None:
    """Where the system had no more open files to give: no file is to blame, nor the disk that it is on."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        _say_error("LPS607", f"{error.filename}: too many open files", "raise the limit: `ulimit -n 4096`")
        _leave("", ExitCode.RESOURCE)


def _usage(error: Exception, words: list[str]) -> int | None:
    """Exit code of a mistake on the command line (Typer's own errors), None for a bug."""
    message: Any = getattr(error, "format_message", None)
    if type(error).__name__ in ("Abort", "Exit"):
        return ExitCode.INTERRUPT if type(error).__name__ == "Abort" else int(getattr(error, "exit_code", 0))
    if message is None:
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        tell(str(message()))
        return ExitCode.USAGE
    context: Any = getattr(error, "ctx", None)
    where = getattr(context, "command_path", None) or " ".join(["lpsparse", *words[:1]])
    _say_error("LPS200", " ".join(str(message()).split()), f"see `{where} --help`")
    return ExitCode.USAGE


def _say_error(code: str, what: str, mend: str) -> None:
    from lpsparse.reporting.text import clean, shorten

    what = shorten(clean(what), 1000)  # a hostile name may be as long as a header
    text = f"error[{code}]: {what}\n  mend: {clean(mend)}"
    note = os.environ.get("TORCHELASTIC_ERROR_FILE")  # where a launcher looks for the error of a process
    if note:
        Path(note).write_text(json.dumps({"message": text, "code": code, "timestamp": int(time.time())}))
    if is_first():
        tell(text)


def _leave(text: str, code: ExitCode) -> NoReturn:
    if text and is_first():
        tell(f"\n{text}")
    _end(int(code))


def _end(code: int) -> NoReturn:
    """Exit. One of several processes goes at once: torch's threads would wait for the others, or abort."""
    if is_one_of_several():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _app() -> typer.Typer:
    from lpsparse.cli import commands, demo, recipe, report, run, sweep

    # Rich's boxes and its traceback are switched off: they wreck grep, and ours are two lines.
    app = typer.Typer(
        name="lpsparse", help=_HELP, epilog=_EXITS, no_args_is_help=True, add_completion=True,
        pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )  # fmt: skip
    app.callback()(_root)
    commands.register(app)
    report.register(app)
    run.register(app)
    sweep.register(app)
    recipe.register(app)
    demo.register(app)
    return app


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"lpsparse {__version__}\n")
        raise typer.Exit()
