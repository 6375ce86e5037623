"""Help in panels, as plain text that survives grep; `lpsparse help TOPIC` and `lpsparse explain CODE`."""

import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Annotated, Any, cast

import typer

from lpsparse.cli.output import Json, NoMessages, print_json, print_result, print_text
from lpsparse.errors import MEANINGS, ExitCode, UsageError
from lpsparse.reporting.text import clean, fitted
from lpsparse.steps.table import COMMANDS, PANELS

MEANT = {  # what people type who know another tool -> what they mean here
    "compress": "prune",
    "sparsify": "prune",
    "diff": "report",
    "compare": "report",
    "train": "finetune",
    "evaluate": "eval",
    "upload": "push",
    "ls": "inspect",
    "show": "inspect",
    "check": "verify",
    "version": "--version",
    "--bf16": "--mixed-precision bf16",
    "--fp16": "--mixed-precision fp16",
    "--amount": "--sparsity",
    "--force": "--overwrite",
    "--output": "OUT, the second argument",
}
_LEAST = 20  # letters of a line of that text; where there is less room it is below, too
_COMMON = 80  # columns of a terminal; in these and more, examples stay on one line
_WIDEST = 30  # letters of an option that has its text beside it, not below

Command: Any = None
Group: Any = None
with suppress(ImportError):  # see `borrowed`: help is then as Typer shows it
    from typer.core import TyperCommand, TyperGroup

    class _Fitted:
        """Help that keeps to the terminal's width: Typer's own is never under 50 columns."""

        help: str | None

        def format_help(self, ctx: Any, formatter: Any) -> None:
            formatter.width = max(_LEAST, min(formatter.width, get_terminal_size().columns))
            cast("Any", super()).format_help(ctx, formatter)

        def format_usage(self, ctx: Any, formatter: Any) -> None:
            params = cast("Any", self).get_params(ctx)
            places = [_place(param) for param in params if param.param_type_name == "argument"]
            words = [ctx.command_path, *(places or ["COMMAND"]), "[OPTIONS]"]
            formatter.write(f"{fitted('Usage: ' + ' '.join(words), formatter.width, hang=4)}\n")

        def format_help_text(self, ctx: Any, formatter: Any) -> None:
            lines = (self.help or "").split("\n")
            formatter.write("\n")
            with formatter.indentation():
                formatter.write_text("\n".join(_continued(line, formatter.width - 2) for line in lines))

    class PanelCommand(_Fitted, TyperCommand):
        """A command whose options are shown by panel."""

        def format_options(self, ctx: Any, formatter: Any) -> None:
            _write_options(self, ctx, formatter)

    class PanelGroup(_Fitted, TyperGroup):
        """All commands, by what they are for; those of a command of its own in one list."""

        def format_options(self, ctx: Any, formatter: Any) -> None:
            self.format_commands(ctx, formatter)
            _write_options(self, ctx, formatter)

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            panels: dict[str, list[tuple[str, str]]] = {}
            for name in self.list_commands(ctx):
                panel = COMMANDS[name].panel if ctx.parent is None else "Commands"
                text = str(cast("Any", self.get_command(ctx, name)).help)
                panels.setdefault(panel, []).append((name, text.partition("\n\n")[0]))
            _write(formatter, panels)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name = args[0]
            if self.get_command(ctx, name) is None and not ctx.resilient_parsing:
                near = get_close_matches(name.lower(), self.list_commands(ctx), n=2)
                near = [MEANT[name.lower()]] if name.lower() in MEANT else near
                hint = f"did you mean {' or '.join(near)}? `{ctx.command_path} --help` lists the commands"
                hint = hint if near else f"see `{ctx.command_path} --help`"
                raise UsageError(200, f"no such command: {name}", hint=hint)
            return super().resolve_command(ctx, args)

    Command, Group = PanelCommand, PanelGroup


def _place(param: Any) -> str:
    """An argument's name, in brackets where it may be left out."""
    name = (param.metavar or param.name.upper()).strip("[]")
    return name if param.required else f"[{name}]"


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    rows: dict[str, list[tuple[str, str]]] = {name: [] for name in PANELS}
    params = command.get_params(ctx)
    for param in params:
        record = param.get_help_record(ctx)
        if record is not None:
            name, text = record
            panel = getattr(param, "rich_help_panel", None) or "Other"
            if param.param_type_name == "argument":
                panel, name = "Arguments", _place(param)
            elif not param.default:  # --no-NAME is for who has set it in the environment
                name = re.sub(r" / --no-\S+", "", name)
            rows[panel].append((name, text))
    _write(formatter, rows)
    hidden = sum(bool(getattr(param, "hidden", False)) for param in params)
    if hidden:
        text = f"{hidden} more options for special cases: {ctx.command_path} --help-all"
        formatter.write(f"\n{fitted(text, formatter.width)}\n")


def _write(formatter: Any, rows: dict[str, list[tuple[str, str]]]) -> None:
    """Each panel as a heading and a list. Typer's own would break flags at their hyphens."""
    for panel, each in rows.items():
        room = min(_WIDEST, max((len(name) for name, _ in each), default=0))
        for i, (name, text) in enumerate(each):
            formatter.write(f"\n{panel}:\n" if i == 0 else "")
            under = 2 if formatter.width < room + 4 + _LEAST else room  # how far to the right the text is
            lines = wrap(text, formatter.width - under - 4, break_on_hyphens=False, break_long_words=False)
            beside = lines[:1] if len(name) <= under else []
            words = _filled(re.findall(r"[^\s|]+\|?\s*", name), formatter.width - 6)  # choices may part
            formatter.write(f"  {words[0]:<{under}}  {''.join(beside)}".rstrip() + "\n")
            for line in words[1:]:
                formatter.write(f"    {line}\n")
            for line in lines[len(beside) :]:
                formatter.write(f"{'':{under + 4}}{line}\n")


def _filled(parts: list[str], width: int) -> list[str]:
    """The parts in lines of `width` letters; one that is longer stays whole."""
    lines = parts[:1]
    for part in parts[1:]:
        if len((lines[-1] + part).rstrip()) > width:
            lines.append(part)
        else:
            lines[-1] += part
    return [line.rstrip() for line in lines]


def _continued(line: str, width: int) -> str:
    """An example that a narrow terminal has no room for, on lines that a shell puts together again."""
    if not line.startswith("  lpsparse ") or len(line) <= width or width >= _COMMON - 4:
        return line
    words = re.findall(r"(?:'[^']*'|\S)+\s*", line)
    return "  " + " \\\n    ".join(_filled(words, width - 6))


# lpsparse help

TOPICS = Path(__file__).with_name("topics.md")


def help_(
    ctx: typer.Context,
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="A topic or a command.")] = None,
    as_json: Json = False,
    quiet: NoMessages = False,
) -> None:
    """\b
    Examples:
      lpsparse help exit-codes
      lpsparse help prune"""
    texts = read_topics()
    group: Any = ctx.find_root().command
    if topic is None:
        topics = {name: text.partition("\n")[0] for name, text in texts.items()}
        if as_json:
            print_json({"topics": topics})
        else:
            print_result("\n".join(f"lpsparse help {name:<12}  {title}" for name, title in topics.items()))
            print_result("lpsparse help COMMAND       the same as lpsparse COMMAND --help")
    elif topic in texts:
        if as_json:
            print_json({"topic": topic, "text": texts[topic]})
        else:
            print_text(texts[topic])
    elif topic in group.commands:
        group.main(args=[topic, "--help"], prog_name="lpsparse", standalone_mode=False)
    else:
        near = get_close_matches(topic.lower(), [*texts, *group.commands], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"topics are {', '.join(texts)}"
        raise UsageError(219, f"{clean(topic)}: no such topic or command", hint=hint)


def read_topics() -> dict[str, str]:
    """Name -> text; its first line is the title."""
    parts = re.split(r"^# (.+)\n\n", TOPICS.read_text("utf-8"), flags=re.MULTILINE)[1:]
    written = {name: _flowing(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    return {"exit-codes": _exit_codes(), **written}


def _flowing(text: str) -> str:
    """A paragraph or item as one line, which is broken where the terminal ends."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        if line and lines and lines[-1] and not re.match(r"- |\d\. ", line):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _exit_codes() -> str:
    rows = [f"  {int(code):>3} {code.name.lower():<10} {text}" for code, text in MEANINGS.items()]
    end = "They do not change. A launcher has its own: torchrun ends with 1, whatever its processes end with."
    return "\n".join(["How every command ends.", "", *rows, "", end])


# lpsparse explain

CODES = Path(__file__).with_name("codes.yaml")
# Else the hundreds are the exit code, and 600 is told with that of the process which ended.
_EXITS = {
    750: (ExitCode.RESUMABLE, ExitCode.INTERRUPT),
    751: (ExitCode.RESUMABLE,),
    754: (ExitCode.RESUMABLE,),
    755: (ExitCode.INTERRUPT,),
    600: (ExitCode.RESOURCE, *(code for code in ExitCode if code not in (ExitCode.OK, ExitCode.RESOURCE))),
}


def explain(
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="LPS312, lps312 or 312.")] = None,
    as_json: Json = False,
    quiet: NoMessages = False,
) -> None:
    """\b
    Examples:
      lpsparse explain LPS312
      lpsparse explain 312 --json
      lpsparse explain"""
    texts = read_texts()
    if code is not None:
        number = _number(code, texts)
        if as_json:
            print_json(_as_data(number, texts[number]))
        else:
            _print_one(number, texts[number])
    elif as_json:
        print_json({"codes": [_as_data(*item) for item in texts.items()]})
    else:
        _print_all(texts)


def read_texts() -> dict[int, str]:
    """Number -> its text, which begins with a sentence that is its title."""
    import yaml

    return {number: text.strip() for number, text in yaml.safe_load(CODES.read_text("utf-8")).items()}


def exits_of(number: int) -> tuple[ExitCode, ...]:
    """The exit codes with which an error of that number ends the program."""
    return _EXITS.get(number) or (ExitCode(number // 100),)


def _number(code: str, texts: dict[int, str]) -> int:
    """Raises UsageError for what is no code, with the nearest ones."""
    found = re.fullmatch(r"(?:lps)?([0-9]{3})", code.strip(), re.IGNORECASE)
    if found is None:
        hint = "give one such as LPS312; `lpsparse explain` lists them all"
        raise UsageError(218, f"{clean(code)}: not a code", hint=hint)
    number = int(found[1])
    if number not in texts:
        nearest = sorted(sorted(texts, key=lambda other: abs(other - number))[:3])
        near = ", ".join(f"LPS{each}" for each in nearest)
        hint = f"the nearest are {near}; `lpsparse explain` lists them all"
        raise UsageError(218, f"LPS{number}: no such code", hint=hint)
    return number


def _as_data(number: int, text: str) -> dict[str, Any]:
    exits = [{"exit_code": int(code), "name": code.name.lower()} for code in exits_of(number)]
    return {"code": f"LPS{number}", "title": _title(text), "text": text, "exits": exits}


def _title(text: str) -> str:
    return re.split(r"\.(?: |$)", text, maxsplit=1)[0]


def _print_one(number: int, text: str) -> None:
    print_result(f"LPS{number}: {_title(text)}\n")
    rest = text.removeprefix(f"{_title(text)}.").strip()
    if rest:
        print_text(f"  {rest}\n")
    exits = exits_of(number)
    if len(exits) < 3:
        print_result(f"  exit code {' or '.join(f'{int(code)} ({code.name.lower()})' for code in exits)}")
    else:
        print_result("  exit code: that of the process")


def _print_all(texts: dict[int, str]) -> None:
    by_exit: dict[ExitCode, list[int]] = {}
    for number in texts:
        by_exit.setdefault(exits_of(number)[0], []).append(number)
    for code, numbers in sorted(by_exit.items()):
        print_result(f"exit code {int(code)}, {code.name.lower()}: {MEANINGS[code]}")
        print_result("".join(f"  LPS{number}  {_title(texts[number])}\n" for number in numbers))
