"""`lpsparse doctor`: is this machine fit, in lines to paste into a report."""

from pathlib import Path
from typing import Annotated

import typer

from lpsparse.cli.output import Voice, print_json, print_result

_HELP = """Check versions, memory, devices, processes, the disk and the hub.

Exit 6 where something fails, 4 where it is the disk alone. What it prints holds no secrets.

\b
Examples:
  lpsparse doctor
  lpsparse doctor /scratch --json"""


def register(app: typer.Typer) -> None:
    app.command("doctor", help=_HELP)(doctor)


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where OUT would be written.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no messages.")] = False,
) -> None:
    from lpsparse.commands import doctor

    Voice(quiet).say("looking; torch and two processes take some seconds to start")
    found = doctor.doctor(folder)
    if as_json:
        print_json(found)
    else:
        for check in found["checks"]:
            print_result(f"{check['status']:<4}  {check['name']:<15}  {check['found']}")
            if "hint" in check:
                print_result(f"        hint: {check['hint']}")
    if not found["ok"]:
        raise typer.Exit(found["exit_code"])
