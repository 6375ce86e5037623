"""What MkDocs calls: the command reference, made from the commands when the pages are built."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_HEAD = """# Command reference

Made from the commands when these pages are built, so it says what `lpsparse COMMAND --help` says. A flag wins
over the variable that stands beside it, the variable over a recipe, the recipe over the default.
"""


def on_files(files: Any, config: Any) -> Any:
    """The pages, and this one that no file holds."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))  # the commands of this checkout, not of one that is installed
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page in which the comment `<!-- lpsparse help TOPIC -->` is that topic's text."""
    return re.sub(r"<!-- lpsparse help (\w+) -->", lambda found: _topic(found[1]), markdown)


def reference() -> str:
    """The page, in Markdown."""
    from typer.main import get_command

    from lpsparse.cli.main import build_app

    parts = [_HEAD]
    for path, command in commands(get_command(build_app()), ("lpsparse",)):
        parts += [f"## {' '.join(path[1:])}\n", *_command(path, command)]
    return "\n".join([*parts, "## Exit codes\n", *_exit_codes(), "", *_environment()]) + "\n"


def commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it, those of a group after it."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def _command(path: tuple[str, ...], command: Any) -> Iterator[str]:
    context = command.make_context(path[-1], [], resilient_parsing=True)
    for parameter in command.params:
        parameter.hidden = False  # the advanced options too
    records = [(parameter, parameter.get_help_record(context)) for parameter in command.params]
    shown = [(parameter, record) for parameter, record in records if record is not None]
    arguments = [
        (p.metavar or p.name.upper(), text) for p, (_, text) in shown if not p.opts[0].startswith("-")
    ]
    told, _, examples = (command.help or "").partition("\b\nExamples:\n")
    yield _plain(told.strip()) + "\n"
    yield f"```text\n{' '.join([*path, *(name for name, _ in arguments), '[OPTIONS]'])}\n```\n"
    if examples:
        yield f"```sh\n{re.sub('^  ', '', examples, flags=re.MULTILINE).rstrip()}\n```\n"
    for name, text in arguments:
        yield f"`{name}`\n:   {_plain(text)}\n"
    for parameter, (words, text) in shown:
        if parameter.opts[0].startswith("-"):
            name = _variable(path[-1], parameter.name)
            yield f"`{words}`\n:   {_plain(text)}{f' `{name}`' if name else ''}\n"


def _variable(command: str, field: str) -> str | None:
    """The environment's name of an option, where it has one: `settings.resolve` reads those of steps."""
    from lpsparse.steps.resolve import variable
    from lpsparse.steps.table import COMMANDS, step_of

    fields = step_of(command).model_fields if command in COMMANDS and COMMANDS[command].step else {}
    return variable(field) if field in fields and fields[field].annotation is not Path else None


def _exit_codes() -> Iterator[str]:
    """The table that `lpsparse help exit-codes` prints."""
    from lpsparse.errors import MEANINGS

    yield "The same for every command; `lpsparse.ExitCode` in Python. They do not change.\n"
    yield "| code | name | meaning |\n| --- | --- | --- |"
    yield from (f"| {int(code)} | {code.name.lower()} | {text} |" for code, text in MEANINGS.items())


def _environment() -> Iterator[str]:
    """What `lpsparse help environment` prints."""
    yield "## Environment\n"
    yield _topic("environment")


def _topic(name: str) -> str:
    """A text of `lpsparse help`, without its title, as Markdown."""
    from lpsparse.cli.help import read_topics

    return read_topics()[name].partition("\n")[2].strip() + "\n"


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))
