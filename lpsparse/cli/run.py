"""`lpsparse run RECIPE.yaml`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsparse.cli.output import Quiet, Verbose, Voice, has_color, print_json, print_result, tell_runner, width
from lpsparse.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report

_HELP = """Run the steps of a recipe; each step's output is the next one's input, finished steps are skipped.

\b
Examples:
  lpsparse run recipes/minilm-sst2.yaml --set model=./minilm --set data=./sst2
  lpsparse run recipe.yaml --set out=run2 --set prune.sparsity=0.9"""


def register(app: typer.Typer) -> None:
    app.command("run", help=_HELP)(run)


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as recipes/demo.yaml.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override model, data, out or STEP.KEY."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    from lpsparse.cli.bar import showing
    from lpsparse.recipes import run

    voice = Voice(quiet, verbose)
    with showing(voice):
        done: list[run.Done] = []
        for each in run.run_each(recipe, overrides(set_ or []), voice.say):
            done.append(each)
            if each.name == "report" and not isinstance(each.result, dict):
                tell_runner(each.result)
    if as_json:
        print_json({"steps": [{"step": each.name, "result": as_data(each.result)} for each in done]})
    else:
        for each in done:
            print_result(summary(each.name, each.result))
    if not run.passed(done):
        raise typer.Exit(ExitCode.VERDICT)


def overrides(pairs: list[str]) -> dict[str, str]:
    """`--set` words as a table. Raises UsageError for a word without '='."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(207, f"--set {pair}: not KEY=VALUE", hint="such as --set model=./folder")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def as_data(result: "Report | dict[str, Any]") -> Any:
    return result if isinstance(result, dict) else result.model_dump(mode="json")


def summary(name: str, result: "Report | dict[str, Any]") -> str:
    """One line for a step; the whole table for a report."""
    if not isinstance(result, dict):
        from lpsparse.reporting import table

        if name == "report":
            return table.render(result, width(), color=has_color())
        return f"{name}: {table.headline(result)}"
    facts = (
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in result.items()
    )
    return f"{name}: {', '.join(facts)}"
