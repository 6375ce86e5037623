"""A recipe at several sparsities: the curve of size against quality, and the smallest model that is good
enough."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.files import as_json, write_beside
from lpsparse.checkpoint.open import locate
from lpsparse.commands import base
from lpsparse.commands.report import report_on
from lpsparse.errors import UsageError
from lpsparse.parallel.environment import is_rank_0
from lpsparse.recipes import run
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.outputs import check_free, set_aside
from lpsparse.recipes.plan import Link, made_keys, planned
from lpsparse.recipes.run import Done, Say
from lpsparse.reporting.charts import sweep_figure
from lpsparse.reporting.records import Budget, Report
from lpsparse.steps.base import Step, about, fraction

_FILES = ("sweep.json", "sweep.csv", "sweep.svg")
_COLUMNS = (
    "sparsity",
    "zeros",
    "weights",
    "file_bytes",
    "bitmask_bytes",
    "metric",
    "before",
    "after",
    "passed",
    "folder",
)


@dataclass(frozen=True, slots=True)
class _Placed:
    """The steps of the recipe at one sparsity, in its folder."""

    all: list[Link]
    own: list[Link]  # those that depend on the sparsity


def sweep(
    recipe: str | Path,
    sparsity: Iterable[Any],
    out: str | Path | None = None,
    overrides: Mapping[str, str] | None = None,
    say: Say = base.silent,
    on_step: Callable[[Any], None] = base.silent,
) -> dict[str, Any]:
    """Run a recipe once for each sparsity: {"rows", "dense", "smallest", ...}, which OUT/sweep.json,
    sweep.csv and sweep.svg hold, too. `smallest` is the folder, in OUT, of the model with the fewest bytes
    (of its files, then as a bitmask) among those that meet the budgets; None where there is none.

    Each run lies in a folder of its own, such as OUT/s0.80; what does not depend on the sparsity is made
    once, in OUT/shared. Finished steps are skipped. Raises UsageError for a recipe that cuts to no sparsity.
    """
    path, values = Path(recipe), _values(sparsity)
    read = read_recipe(path, overrides or {})
    links = planned(read, overrides or {}, path)
    varied = _varied(path, links)
    folder = read.out.with_name(f"{read.out.name}-sweep") if out is None else Path(out)
    placed = {value: _place(links, varied, value, read.out, folder) for value in values}
    check_free(folder)
    with set_aside([folder / name for name in _FILES]):
        locate(read.model)
        return _swept(path, placed, varied, folder, say, on_step) | {"out": str(folder)}


def _swept(
    path: Path,
    placed: Mapping[Decimal, _Placed],
    varied: set[int],
    folder: Path,
    say: Say,
    on_step: Callable[[Any], None],
) -> dict[str, Any]:
    """The runs at all sparsities, and their table, which is in `folder`, too."""
    first = next(iter(placed.values()))
    with run.folder_for(folder):
        shared = [link for link in first.all if link.index not in varied]
        with run.folder_for(folder / "shared"):
            common = list(run.run_links(shared, say, on_step, first.all))
        rows: list[dict[str, Any]] = []
        for value, at in placed.items():
            say(f"sparsity {value}:")
            with run.folder_for(folder / f"s{_short(value)}"):
                done = list(run.run_links(at.own, say, on_step, at.all))
            rows.append(_row(value, at.own, common, done, folder))
        found = _result(path, rows, _dense(first.own[0].model, common, rows))
        if is_rank_0():
            _write(folder, found)
    return found


def _values(given: Iterable[Any]) -> list[Decimal]:
    values: list[Decimal] = []
    for each in given:
        try:
            value = Decimal(str(fraction(each)).strip())
        except InvalidOperation:
            value = Decimal(-1)
        if not value.is_finite() or not 0 <= value < 1 or value in values:
            why = "stands twice" if value in values else "not a fraction from 0 to below 1"
            raise UsageError(284, f"--sparsity {each}: {why}", hint="such as --sparsity 0.5,0.7,0.8,0.9")
        values.append(value)
    if not values:
        raise UsageError(284, "--sparsity: no values", hint="such as --sparsity 0.5,0.7,0.8,0.9")
    return sorted(values)


def _varied(path: Path, links: Sequence[Link]) -> set[int]:
    """The steps that depend on the sparsity: those that cut to one, and what follows from their results."""
    varied: set[int] = set()
    made: set[str] = set()
    for link in links:
        step, taken = link.step, made_keys(type(link.step))
        rule = next((name for name in step.rivals if not step.at_default(name)), "sparsity")
        if rule != "sparsity":
            what = f"{path}: steps[{link.index}].prune cuts by {rule}: no sparsity to vary"
            raise UsageError(286, what, hint="give it a sparsity, or run the recipe as it is")
        if _swept_keys(step) or any(str(getattr(step, key)) in made for key in taken):
            varied.add(link.index)
            made |= {str(link.out)} if link.out is not None else set()
    if not made:
        what = f"{path}: no step has a target_sparsity or a sparsity to vary"
        raise UsageError(285, what, hint="give one to a finetune or prune step")
    return varied


def _place(links: Sequence[Link], varied: set[int], value: Decimal, was: Path, folder: Path) -> _Placed:
    """The steps with their results in `folder`, at one sparsity."""
    moved: dict[str, str] = {}
    found: list[Link] = []
    for link in links:
        named = {key: getattr(link.step, key) for key in made_keys(type(link.step))}
        changes: dict[str, Any] = {
            key: type(at)(moved[str(at)]) for key, at in named.items() if str(at) in moved
        }
        if link.out is not None:
            part = f"s{_short(value)}" if link.index in varied else "shared"
            changes["out"] = folder / part / link.called
            moved[str(link.out)] = str(changes["out"])
        changes |= dict.fromkeys(_swept_keys(link.step), value)
        found.append(replace(link, step=link.step.model_copy(update=changes)))
    return _Placed(found, [link for link in found if link.index in varied])


def _swept_keys(step: Step) -> list[str]:
    """The settings of a step that are the sparsity it cuts to."""
    known = about(type(step))
    return [name for name, each in known.items() if each.is_swept and getattr(step, name) is not None]


def _short(value: Decimal) -> str:
    return f"{value:.2f}" if value == value.quantize(Decimal("0.01")) else str(value.normalize())


def _row(
    value: Decimal, links: Sequence[Link], common: Sequence[Done], own: Sequence[Done], folder: Path
) -> dict[str, Any]:
    """The model at one sparsity. The figures are of the folder that the row names; the budgets are those of
    every report, of this folder's first."""
    out = _named(links, own)
    mine = [each.result for each in own if each.name == "report" and each.model == str(out)]
    report = mine[-1] if mine else report_on(out)
    assert isinstance(report, Report)
    budgets = [budget for each in (*reversed(own), *common) for budget in _budgets(each)]
    budgets.sort(key=lambda budget: budget not in report.budgets)
    metric, before, after, higher = _quality(report, own, _alike(str(out), own))
    return {
        "sparsity": float(value),
        "folder": out.relative_to(folder).as_posix(),
        "layout": report.layout,
        "zeros": report.prunable.zeros,
        "weights": report.prunable.weights,
        "file_bytes": report.bytes.file_bytes,
        "bitmask_bytes": report.bytes.bitmask_bytes,
        "metric": metric,
        "before": before,
        "after": after,
        "higher_is_better": higher,
        "budgets": [budget.model_dump(mode="json") for budget in budgets],
        "passed": run.passed([*common, *own]),
    }


def _named(links: Sequence[Link], own: Sequence[Done]) -> Path:
    """The folder that stands for a sparsity: what the last report with budgets looked at, else what the last
    step that writes has made."""
    outs = {str(link.out): link.out for link in links if link.out is not None}
    judged = [each.model for each in own if each.name == "report" and _budgets(each)]
    return outs[next((model for model in reversed(judged) if model in outs), list(outs)[-1])]


def _budgets(done: Done) -> tuple[Budget, ...]:
    return () if done.report is None else done.report.budgets


def _alike(model: str, done: Sequence[Done]) -> set[str]:
    """The folders that hold the weights of `model`, in whatever layout."""
    found = {model}
    stored = [(each.model, str(each.step.destination)) for each in done if each.step.restores]
    for source, out in reversed(stored):
        found |= {source} if out in found else set()
    for source, out in stored:
        found |= {out} if source in found else set()
    return found


def _quality(
    report: Report, done: Sequence[Done], alike: set[str]
) -> tuple[str | None, float | None, float | None, bool]:
    """Metric, before and after: what was recorded of these weights, else what an `eval` step measured."""
    if report.quality:
        quality = report.quality[0]
        return quality.metric, quality.before, quality.after, quality.higher_is_better
    metric, value = _measured(done, alike)
    return metric, None, value, metric == "accuracy"


def _measured(done: Sequence[Done], alike: set[str]) -> tuple[str | None, float | None]:
    """What the last `eval` step of one of these models measured."""
    found = [each.result.as_data() for each in done if each.step.measures and each.model in alike]
    if not found:
        return None, None
    metric = "accuracy" if "accuracy" in found[-1] else "loss"
    return metric, found[-1][metric]


def _dense(model: str, common: Sequence[Done], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The model that all the runs begin with."""
    report = report_on(model)
    metric, value = _measured(common, _alike(model, common))
    recorded = [row["before"] for row in rows if row["before"] is not None]
    return {
        "zeros": report.prunable.zeros,
        "weights": report.prunable.weights,
        "file_bytes": report.bytes.file_bytes,
        "bitmask_bytes": report.bytes.bitmask_bytes,
        "quality": recorded[0] if recorded else value if metric == rows[0]["metric"] else None,
    }


def _result(path: Path, rows: list[dict[str, Any]], dense: dict[str, Any]) -> dict[str, Any]:
    good = [row for row in rows if row["passed"]]
    best = min(good, key=lambda row: (row["file_bytes"], row["bitmask_bytes"], -row["zeros"]), default=None)
    smallest = None if best is None else best["folder"]
    return {"schema_version": 1, "recipe": path.name, "dense": dense, "rows": rows, "smallest": smallest}


def _write(folder: Path, found: dict[str, Any]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found["rows"])
    for name, text in zip(_FILES, (as_json(found), table.getvalue(), sweep_figure(found)), strict=True):
        write_beside(folder / name, text)
