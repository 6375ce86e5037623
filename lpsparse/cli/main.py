"""Assemble the commands, and turn every failure into two lines and an exit code."""

import errno
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from traceback import print_exc
from typing import Annotated, Any, NoReturn

import typer

from lpsparse import __version__
from lpsparse.cli import signals
from lpsparse.cli.help import MEANT, Command, Group
from lpsparse.cli.output import silence, tell, tell_runner_error
from lpsparse.errors import ExitCode, LaunchError, LpsparseError, is_out_of_memory
from lpsparse.parallel.environment import has_other_ranks, is_rank_0, set_torch_names, switched_on
from lpsparse.steps.table import COMMANDS

_HELP = """Make pretrained checkpoints small, and prove that they still work.

\b
Start with:
  lpsparse demo
  lpsparse doctor
  lpsparse help
"""
_EXITS = (
    f"Exit codes: {', '.join(f'{int(code)} {code.name.lower()}' for code in ExitCode)}.\n\n"
    "`lpsparse COMMAND --help` has options and examples; --debug, of every command, shows where an error "
    "comes from."
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with an ExitCode."""
    try:
        signals.listen()
        _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while an error was being told
        _interrupted()


def _run(words: list[str]) -> None:
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    code: Any = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of ASCII still shows every name
    try:
        set_torch_names()
        if any(key.startswith("LPSPARSE_") for key in os.environ):
            from lpsparse.steps.resolve import check_environment

            check_environment()
        app = build_app(None if "_LPSPARSE_COMPLETE" in os.environ else words)
        code = app(args=words, prog_name="lpsparse", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        _interrupted()
    except LpsparseError as error:
        if debug:
            print_exc()
        _leave_without_files(error.__cause__)
        if not isinstance(error, LaunchError):
            _say_error(error.code, error.what, error.hint)
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
        if code is None and signals.asked:  # what some library has made of it
            _interrupted()
        if code is None:
            print_exc()
            code = ExitCode.BUG
    if code == ExitCode.INTERRUPT:  # Typer turns Ctrl-C inside a command into this code
        _interrupted()
    _end(int(code) if isinstance(code, int) else 0)


def _interrupted() -> NoReturn:
    if signal.SIGTERM in signals.asked:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # a launcher that stops its processes says why
            hint = "run the command again; `prune` and `pack` reuse finished weight files"
            _say_error("LPS751", "stopped by SIGTERM before the result was complete", hint)
        _leave("", ExitCode.RESUMABLE)
    _leave("interrupted: the input is untouched, no half-written OUT is left", ExitCode.INTERRUPT)


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
    what, hint = " ".join(str(message()).split()), f"see `{where} --help`"
    given = str(getattr(error, "option_name", None) or "")
    near = [MEANT[given]] if given in MEANT else sorted(getattr(error, "possibilities", None) or [])
    missing = _missing(context) if type(error).__name__ == "MissingParameter" else ""
    if missing:
        what, hint = f"{where} needs {missing}", f"see `{where} --help`, which has examples"
    elif given:
        what = f"no such option: {given}"
        hint = f"did you mean {' or '.join(near)}? {hint}" if near else hint
    _say_error("LPS200", what, hint)
    return ExitCode.USAGE


def _missing(context: Any) -> str:
    """All that a command needs and was not given, in words."""
    params: list[Any] = getattr(getattr(context, "command", None), "params", [])
    names = [
        param.metavar or param.name.upper() if param.param_type_name == "argument" else param.opts[0]
        for param in params
        if (param.required or "[required]" in str(getattr(param, "help", "")))
        and not context.params.get(param.name)
    ]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _say_error(code: str, what: str, hint: str) -> None:
    from lpsparse.reporting.text import clean, shorten

    what = shorten(clean(what), 1000)  # a hostile name may be as long as a header
    text = f"error[{code}]: {what}\n  hint: {clean(hint)}"
    note = os.environ.get("TORCHELASTIC_ERROR_FILE")  # where a launcher looks for the error of a process
    if note:
        Path(note).write_text(json.dumps({"message": text, "code": code, "timestamp": int(time.time())}))
    if is_rank_0():
        tell(text)
        tell_runner_error(code, what, hint)


def _leave(text: str, code: ExitCode) -> NoReturn:
    if text and is_rank_0():
        tell(f"\n{text}")
    _end(int(code))


def _end(code: int) -> NoReturn:
    """Exit. One of several processes goes at once: torch's threads would wait for the others, or abort."""
    signals.end_quietly(code)
    if has_other_ranks():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def build_app(words: Collection[str] | None = None) -> typer.Typer:
    """The command line. Of the commands that `words` do not name only the line of help is there, so that
    nothing else is imported."""
    app = _typer(_HELP, name="lpsparse", epilog=_EXITS, add_completion=True)
    app.callback()(_root)
    for name, command in COMMANDS.items():
        if not command.panel:
            continue
        if words is not None and name not in words:
            app.command(name, help=command.help)(_not_named)
        elif name == "recipe":
            app.add_typer(_recipe(command.help), name=name)
        elif command.step:
            from lpsparse.cli import commands, report

            (report if name == "report" else commands).add(app, name)
        else:
            function = command.load("run")
            rest = inspect.cleandoc(function.__doc__ or "")
            app.command(name, help=f"{command.help}\n\n{rest}")(function)
    return app


def _recipe(about: str) -> typer.Typer:
    from lpsparse.cli import recipes

    examples = "  lpsparse recipe check recipe.yaml\n  lpsparse recipe schema > recipe.schema.json"
    group = _typer(f"{about}\n\n\b\nExamples:\n{examples}")
    group.command("check")(recipes.check)
    group.command("schema")(recipes.schema)
    return group


def _not_named() -> NoReturn:
    raise AssertionError("a command was given, and is not registered")


class _App(typer.Typer):
    """A Typer whose commands have help in panels and the switches of the environment."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=Command, context_settings={"default_map": _defaults()}, **options)


def _typer(about: str, **options: Any) -> typer.Typer:
    # Rich's boxes and its traceback are switched off: they break grep, and ours are two lines.
    return _App(
        help=about,
        cls=Group,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **options,
    )


def _defaults() -> dict[str, Any]:
    """What the environment asks of every command."""
    switches = ("quiet", "verbose", "full")
    asked: dict[str, Any] = {name: True for name in switches if switched_on(f"LPSPARSE_{name.upper()}")}
    # Of report, --json is a file.
    return asked | ({"as_json": True, "json_file": "-"} if switched_on("LPSPARSE_JSON") else {})


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="Print the version.", is_eager=True, callback=lambda v: _version(v)
        ),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"lpsparse {__version__}\n")
        raise typer.Exit()
