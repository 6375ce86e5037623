"""`lpsparse run`, `lpsparse sweep` and `lpsparse recipe`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpsparse.cli.output import (
    Json,
    Quiet,
    Verbose,
    Voice,
    has_color,
    print_json,
    print_result,
    tell_runner,
    tell_runner_of_sweep,
    width,
)
from lpsparse.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from lpsparse.recipes.run import Done

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as recipes/demo.yaml.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override model, data, out or STEP.KEY; repeatable.",
        rich_help_panel="Input",
    ),
]


def run(
    recipe: Recipe, set_: Set = None, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False
) -> None:
    """Each step's output is the next one's input.

    \b
    Examples:
      lpsparse run recipes/minilm-sst2.yaml --set model=./minilm --set data=./sst2
      lpsparse run recipe.yaml --set out=run2 --set prune.sparsity=0.9"""
    from lpsparse.cli.bar import showing
    from lpsparse.recipes import run

    voice = Voice(quiet, verbose)
    with showing(voice):
        done: list[run.Done] = []
        for each in run.run_each(recipe, overrides(set_ or []), voice.say):
            done.append(each)
            if each.report is not None and each.name == "report":
                tell_runner(each.report)
    if as_json:
        print_json({"steps": [{"step": each.name, "result": each.result.as_data()} for each in done]})
    else:
        for each in done:
            print_result(summary(each))
    if not run.passed(done):
        raise typer.Exit(ExitCode.VERDICT)


def overrides(pairs: list[str]) -> dict[str, str]:
    """`--set` words as a table. Raises UsageError for a word without '='."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(207, f"--set {pair}: not KEY=VALUE", hint="such as --set model=./folder")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def summary(each: "Done") -> str:
    """One line for a step; the whole table for a report."""
    if each.report is not None:
        from lpsparse.reporting import table

        if each.name == "report":
            return table.render(each.report, width(), color=has_color())
        return f"{each.name}: {table.headline(each.report)}"
    facts = (
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in each.result.as_data().items()
    )
    return f"{each.name}: {', '.join(facts)}"


def sweep(
    recipe: Recipe,
    sparsity: Annotated[
        str,
        typer.Option(
            metavar="FRACTIONS",
            help="Sparsities, 0..1, separated by commas.",
            show_default=False,
            rich_help_panel="Method",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder that gets one folder per sparsity. Default: the recipe's out, with -sweep.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Names the smallest model that meets the budgets of its reports; exit 1 when none does. Writes
    OUT/sweep.json, sweep.csv and sweep.svg. Finished runs are not run again.

    \b
    Examples:
      lpsparse sweep recipes/demo.yaml --sparsity 0.5,0.7,0.8,0.9
      lpsparse sweep recipe.yaml --sparsity 0.8,0.9 --out curve --set report.max_quality_drop=0.1"""
    from lpsparse.cli.bar import showing
    from lpsparse.recipes import sweep

    voice = Voice(quiet, verbose)
    with showing(voice):
        parts = [part for part in sparsity.split(",") if part.strip()]
        found = sweep.sweep(recipe, parts, out, overrides(set_ or []), voice.say)
    if as_json:
        print_json(found)
    else:
        _print_sweep(found, voice.say)
    tell_runner_of_sweep(found)
    if found["smallest"] is None:
        raise typer.Exit(ExitCode.VERDICT)


def _print_sweep(found: dict[str, Any], say: Any) -> None:
    from lpsparse.reporting.sweep import failures, rows, verdict
    from lpsparse.reporting.text import columns, fitted

    print_result("\n".join(columns(*rows(found), width())))
    failed = failures(found)
    if failed:
        print_result("\n".join(fitted(f"failed at {text}", width()) for text in failed))
    out = Path(found["out"])
    say(f"wrote {out / 'sweep.svg'}, sweep.csv and sweep.json")
    print_result(verdict(found) + ("" if found["smallest"] is None else f":\n{out / found['smallest']}"))


def check(recipe: Recipe, set_: Set = None, as_json: Json = False) -> None:
    """Check settings, patterns, data, folders, disk and memory of a recipe, without a GPU.

    Nothing is trained or written. Models are known by their headers; of a hub id that is not in the
    cache, only the headers are downloaded.

    \b
    Examples:
      lpsparse recipe check recipes/demo.yaml
      lpsparse recipe check recipe.yaml --set model=./folder --set prune.sparsity=0.9"""
    from lpsparse.recipes.check import check_recipe

    found = check_recipe(recipe, overrides(set_ or []))
    if as_json:
        print_json(found)
    else:
        _print_check(found)


def schema() -> None:
    """Print the JSON Schema of recipes (draft 2020-12).

    \b
    Examples:
      lpsparse recipe schema > recipe.schema.json
      # and as the first line of a recipe:  # yaml-language-server: $schema=recipe.schema.json"""
    from lpsparse.recipes.schema import recipe_schema

    print_json(recipe_schema())


def _print_check(found: dict[str, Any]) -> None:
    from lpsparse.reporting.text import clean, columns, size

    body = [
        (
            f"{i} {each['step']}",
            clean(each["out"] or ""),
            "" if each["prunable_weights"] is None else f"{each['prunable_weights']:,}",
            size(each["disk_bytes"]) if each["out"] else "",
            size(each["memory_bytes"]),
            each["state"],
        )
        for i, each in enumerate(found["steps"], 1)
    ]
    head = ("step", "result", "prunable", "disk, at most", "memory", "")
    print_result("\n".join(columns(head, body, width())))
    print_result(
        f"\ndisk {size(found['disk_bytes'])} of {size(found['free_bytes'])} free; memory "
        f"{size(found['memory_bytes'])} at most (training: without activations and torch itself)"
    )
    if found["download_bytes"]:
        print_result(f"to download: {size(found['download_bytes'])} into the hub's cache")
    for each in found["steps"]:
        for note in each["notes"]:
            print_result(f"not checked: {each['step']}: {clean(note)}")
    print_result(f"{clean(found['recipe'])}: ok")
