"""`lpsparse sweep`: a recipe at several sparsities, and the smallest model that is good enough."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lpsparse.cli.output import Quiet, Verbose, Voice, print_json, print_result, tell_runner_of_sweep, width
from lpsparse.cli.run import overrides
from lpsparse.errors import ExitCode

_HELP = """Run a recipe at several sparsities; name the smallest model that meets the budgets of its reports.

Writes OUT/sweep.json, sweep.csv and sweep.svg; runs that are finished are not run again. Exit 1 when no
model meets the budgets.

\b
Examples:
  lpsparse sweep recipes/demo.yaml --sparsity 0.5,0.7,0.8,0.9
  lpsparse sweep recipe.yaml --sparsity 0.8,0.9 --out curve --set report.max_quality_drop=0.1"""


def register(app: typer.Typer) -> None:
    app.command("sweep", help=_HELP)(sweep)


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as recipes/demo.yaml.")],
    sparsity: Annotated[
        str, typer.Option(metavar="FRACTIONS", help="Sparsities, 0..1, comma separated.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder that gets a folder a sparsity. Default: the recipe's out, with -sweep.",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override model, data or STEP.KEY.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as one JSON object.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    from lpsparse.cli.bar import showing
    from lpsparse.recipes import sweep

    voice = Voice(quiet, verbose)
    with showing(voice):
        parts = [part for part in sparsity.split(",") if part.strip()]
        found = sweep.sweep(recipe, parts, out, overrides(set_ or []), voice.say)
    if as_json:
        print_json(found)
    else:
        _print(found, voice.say)
    tell_runner_of_sweep(found)
    if found["smallest"] is None:
        raise typer.Exit(ExitCode.VERDICT)


def _print(found: dict[str, Any], say: Any) -> None:
    from lpsparse.reporting.sweep import failures, rows, verdict
    from lpsparse.reporting.text import columns, fitted

    print_result("\n".join(columns(*rows(found), width())))
    failed = failures(found)
    if failed:
        print_result("\n".join(fitted(f"failed at {text}", width()) for text in failed))
    out = Path(found["out"])
    say(f"wrote {out / 'sweep.svg'}, sweep.csv and sweep.json")
    print_result(verdict(found) + ("" if found["smallest"] is None else f":\n{out / found['smallest']}"))
