"""`lpsparse help TOPIC`: what is of no single command."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from lpsparse.cli.output import print_json, print_result, print_text
from lpsparse.errors import MEANINGS, UsageError
from lpsparse.reporting.text import clean

TEXTS = Path(__file__).with_name("topics.md")
_EXITS = "exit-codes"
_HELP = """Explain a topic, or a command; without TOPIC, list them.

\b
Examples:
  lpsparse help exit-codes
  lpsparse help prune"""


def register(app: typer.Typer) -> None:
    app.command("help", help=_HELP)(help_)


def help_(
    ctx: typer.Context,
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="A topic or a command.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a topic as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no messages; there are none.")] = False,
) -> None:
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
    """Name -> text, of which the first line is the title."""
    parts = re.split(r"^# (.+)\n\n", TEXTS.read_text("utf-8"), flags=re.MULTILINE)[1:]
    written = {name: _flowing(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    return {_EXITS: _exit_codes(), **written}


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
