"""The files that a run of a recipe keeps in its OUT: the resolved recipe and the reports."""

import os
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from lpsparse import __version__
from lpsparse.checkpoint.files import MANIFEST, REPORT, write_beside
from lpsparse.checkpoint.hub import is_hub_id
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.errors import OutputError
from lpsparse.parallel.environment import is_rank_0
from lpsparse.recipes.file import Recipe
from lpsparse.recipes.plan import Link
from lpsparse.steps.base import Step, about

RESOLVED = "recipe.resolved.yaml"


def write_resolved(read: Recipe, links: Sequence[Link]) -> None:
    """Write it into the recipe's out: `lpsparse run` of it makes the same bytes again."""
    write_beside(read.out / RESOLVED, resolved(read, links))


def resolved(read: Recipe, links: Sequence[Link]) -> str:
    """The recipe as YAML. Paths are as they were given, from the folder in which it ran; those inside that
    folder are relative to it."""
    import yaml

    names = {str(link.out): link.called for link in links if link.out is not None}
    model = _pinned(read.model, links)
    names[read.model] = model
    table: dict[str, Any] = {"version": read.version, "model": model}
    if read.data is not None:
        table["data"] = _path(read.data)
    table["out"] = _path(str(read.out))
    table["steps"] = []
    current = read.model
    for link in links:
        values = _values(link.step, names)
        if link.model != current:
            values = {"model": names.get(link.model, _path(link.model)), **values}
        if link.out is not None:
            values = {"out": link.called, **values}
            current = str(link.out)
        table["steps"].append({link.name: values})
    head = f"# What lpsparse {__version__} ran: every default and override is filled in. Paths are from the\n"
    head += "# folder in which it ran; `lpsparse run` of this file there makes the same bytes.\n"
    if _is_unpinned(model):
        head += "# Of the model no revision is named or known: the hub may give another one then.\n"
    return head + yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=100)


def _pinned(model: str, links: Sequence[Link]) -> str:
    """The recipe's model; a hub id with the revision that the first step of it read."""
    made = [link.out for link in links if link.out is not None and link.model == model]
    if not _is_unpinned(model) or not made:
        return _path(model)
    revision = read_manifest(made[0]).source.revision
    return model if revision is None else f"{model}@{revision}"


def _is_unpinned(model: str) -> bool:
    return is_hub_id(model) and "@" not in model and not os.path.lexists(model)


def _values(step: Step, names: dict[str, str]) -> dict[str, Any]:
    known = about(type(step))
    left = {name for name, each in known.items() if each.local} | {"model", "out"}
    found = step.model_dump(mode="json", exclude=left)
    for name in found:
        if known[name].is_path and isinstance(found[name], str):
            found[name] = names.get(found[name], _path(found[name]))
    for name, info in type(step).model_fields.items():
        if isinstance(getattr(step, name), Decimal):
            found[name] = _number(getattr(step, name))
        if info.alias is not None and name in found:
            found[info.alias] = found.pop(name)
    return found


def _number(value: Decimal) -> float | str:
    """Without its quotes where YAML would read the same digits."""
    return float(value) if str(float(value)) == str(value) else str(value)


def _path(text: str) -> str:
    path = Path(text)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return text


_KEPT = re.compile(r"report(-\d+)?\.json")


_OLD = ".old"


def check_free(out: Path) -> None:
    """Raises OutputError where OUT is itself what a step wrote: it has a report of its own."""
    if (out / MANIFEST).is_file():
        what = f"{out}: is an lpsparse output; writing here would invalidate its manifest"
        raise OutputError(405, what, hint="choose another out")


def report_file(link: Link, links: Sequence[Link], out: Path) -> Path:
    """Where the report of a report step is kept: the last one in OUT/report.json, those before it in
    OUT/report-N.json, N the step's number from 1."""
    last = max(each.index for each in links if each.name == "report")
    return out / (REPORT if link.index == last else f"report-{link.index + 1}.json")


def earlier_reports(links: Sequence[Link], out: Path) -> list[Path]:
    """The reports that an earlier run kept, but those that this one reads before it writes them."""
    needed: set[Path] = set()
    written: set[Path] = set()
    for link in links:
        named = (Path(str(each)) for each in (link.model, getattr(link.step, "baseline", None)))
        needed |= {path / REPORT if path.is_dir() else path for path in named} - written
        if link.name == "report":
            written.add(report_file(link, links, out))
    found = {path.with_name(path.name.removesuffix(_OLD)) for path in out.glob("report*")}
    return sorted(path for path in found - needed if _KEPT.fullmatch(path.name))


@contextmanager
def set_aside(paths: Sequence[Path]) -> Generator[None]:
    """Those of these files that are there have `.old` behind their names until the work inside is done, and
    are deleted then: after work that failed nobody takes an earlier verdict for its own, and none is lost."""
    old = {path: path.with_name(path.name + _OLD) for path in paths} if is_rank_0() else {}
    try:
        for path, name in old.items():
            if path.is_file():
                path.replace(name)
    except OSError as error:
        raise OutputError(404, f"{error.filename}: {error.strerror}", hint="choose another out") from error
    yield
    for name in old.values():
        with suppress(OSError):  # the new ones are whole
            name.unlink()
