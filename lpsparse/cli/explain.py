"""`lpsparse explain CODE`: what an error's code means, why it is refused, and what to do."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lpsparse.cli.output import print_json, print_result, print_text
from lpsparse.errors import MEANINGS, ExitCode, UsageError
from lpsparse.reporting.text import clean

TEXTS = Path(__file__).with_name("codes.yaml")
# Else the hundreds are the exit code, and 600 is told with that of the process which ended.
_EXITS = {
    750: (ExitCode.RESUMABLE, ExitCode.INTERRUPT),
    751: (ExitCode.RESUMABLE,),
    754: (ExitCode.RESUMABLE,),
    755: (ExitCode.INTERRUPT,),
    600: (ExitCode.RESOURCE, *(code for code in ExitCode if code not in (ExitCode.OK, ExitCode.RESOURCE))),
}
_HELP = """Say what an error's code means and what to do; without CODE, list them all.

\b
Examples:
  lpsparse explain LPS312
  lpsparse explain 312 --json
  lpsparse explain"""


def register(app: typer.Typer) -> None:
    app.command("explain", help=_HELP)(explain)


def explain(
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="LPS312, lps312 or 312.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no messages; there are none.")] = False,
) -> None:
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

    return {number: text.strip() for number, text in yaml.safe_load(TEXTS.read_text("utf-8")).items()}


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
