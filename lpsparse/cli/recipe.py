"""`lpsparse recipe`: look at a recipe without running it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lpsparse.cli.app import App
from lpsparse.cli.output import print_json, print_result, width
from lpsparse.cli.run import overrides

_HELP = """Check a recipe before it runs, or print the schema of recipes for an editor.

\b
Examples:
  lpsparse recipe check recipe.yaml
  lpsparse recipe schema > recipe.schema.json"""
_CHECK = """Check settings, patterns, data, folders, disk and memory of a recipe, without a GPU.

Nothing is trained or written. Models are known by their headers; of a hub id that is not in the
cache these alone are fetched.

\b
Examples:
  lpsparse recipe check recipes/demo.yaml
  lpsparse recipe check recipe.yaml --set model=./folder --set prune.sparsity=0.9"""
_SCHEMA = """Print the JSON Schema of recipes (draft 2020-12).

\b
Examples:
  lpsparse recipe schema > recipe.schema.json
  # and as the first line of a recipe:  # yaml-language-server: $schema=recipe.schema.json"""


def register(app: typer.Typer) -> None:
    group = App(help=_HELP)
    group.command("check", help=_CHECK)(check)
    group.command("schema", help=_SCHEMA)(schema)
    app.add_typer(group, name="recipe")


def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as recipes/demo.yaml.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override model, data, out or STEP.KEY."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    from lpsparse.recipes.check import check_recipe

    found = check_recipe(recipe, overrides(set_ or []))
    if as_json:
        print_json(found)
    else:
        _print(found)


def schema() -> None:
    from lpsparse.recipes.schema import recipe_schema

    print_json(recipe_schema())


def _print(found: dict[str, Any]) -> None:
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
