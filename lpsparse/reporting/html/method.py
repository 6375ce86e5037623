"""Show how the model was counted and made, and what was not measured."""

from typing import Any

from lpsparse.reporting.html.parts import MOST_ROWS, Cell, Table, View, count, named, percent, shown
from lpsparse.reporting.records import Made, Report
from lpsparse.reporting.text import shorten

_LONGEST = 300
_MOST_STEPS = 9  # before the last one


def view(report: Report) -> View:
    words: list[Cell] = [f"Counting rule: {report.rule}.", f"Opens with: {report.opens_with}."]
    tables = [_denominators(report)]
    if report.made is None:
        words.append(
            "How it was made is not known: there is no lpsparse.json beside the weights, so there is no "
            "recipe, seed, version or hash to show."
        )
    else:
        words += [f"Note: {note}" for note in report.made.notes[:MOST_ROWS]]
        tables += [_made(report, report.made), *_recipes(report.made), _files(report.made)]
    if report.identity is not None:
        tables.append(_identity(report))
    return View("method", "Method", tuple(words), tables=tuple(tables))


def _denominators(report: Report) -> Table:
    held = report.bytes
    body = [
        (share.of, count(share.zeros), count(share.weights), percent(share.sparsity))
        for share in (report.prunable, report.all)
    ] + [("dense bytes", count(held.zero_bytes), count(held.dense_bytes), percent(held.zero_share))]
    return Table("Three denominators", ("of", "zeros", "all", "share"), body)


def _made(report: Report, made: Made) -> Table:
    recipes = [*(each.recipe for each in made.earlier), made.recipe]
    given = [pair for recipe in recipes for pair in _settings(recipe)]
    seeds = dict.fromkeys(_value(value) for key, value in given if key.split(" ")[-1] == "seed")
    body: list[tuple[Cell, ...]] = [
        ("made by", f"lpsparse {made.lpsparse}"),
        ("from", named(made.source)),
        ("revision", named(made.revision or "none")),
        ("the chain of steps began with", named(made.base)),
        ("seed", ", ".join(seeds) or "none in the settings"),
    ]
    if report.base is not None:
        known = "the source, by its hashes" if report.base.is_source else "not known to be the source"
        body.append(("BASE of this report", named(report.base.name) + f" ({known})"))
    return Table("How it was made", ("what", "value"), body, words=(0, 1))


def _recipes(made: Made) -> list[Table]:
    """The settings of each step, the last step last."""
    steps = [*(each.recipe for each in made.earlier[-_MOST_STEPS:]), made.recipe]
    found: list[Table] = []
    for i, recipe in enumerate(steps, 1):
        body = [(named(key), _value(value)) for key, value in _settings(recipe)[:MOST_ROWS]]
        which = f", step {i} of {len(steps)}" if len(steps) > 1 else ""
        found.append(Table(f"Settings{which}", ("setting", "value"), body, words=(0, 1)))
    return found


def _settings(recipe: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings in a flat list; those of a step have its name in front."""
    found: list[tuple[str, Any]] = []
    for key, value in sorted(recipe.items()):
        inner: dict[str, Any] | None = value if isinstance(value, dict) else None
        found += (
            [(key, value)] if inner is None else [(f"{key} {each}", inner[each]) for each in sorted(inner)]
        )
    return found


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value)) or None
    return "–" if value is None else shorten(shown(value), _LONGEST)


def _files(made: Made) -> Table:
    body = [(named(each.name), count(each.size), each.sha256) for each in made.files[:MOST_ROWS]]
    more = len(made.files) - len(body)
    rest = f"{count(more)} more files are in lpsparse.json." if more else ""
    return Table("Weight files", ("file", "bytes", "sha256"), body, words=(0, 2), rest=rest)


def _identity(report: Report) -> Table:
    assert report.identity is not None
    body = [
        ("weights that the chain began with", report.identity.base_sha256 or "not known"),
        ("names and sizes of what is prunable", report.identity.prunable_sha256),
    ]
    return Table("What two reports must share to be compared", ("sha256 of", "value"), body, words=(0, 1))
