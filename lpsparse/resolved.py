"""What a recipe came to: the recipe again, with every setting that decides the result written out."""

import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from lpsparse import __version__
from lpsparse.chain import Link
from lpsparse.checkpoint.hub import is_hub_id
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.checkpoint.writer import write_beside
from lpsparse.recipe_file import Recipe
from lpsparse.steps.base import Step

RESOLVED = "recipe.resolved.yaml"
_PATHS = ("data", "eval_data", "model_fn", "source", "base", "baseline", "against")
_LEFT = {  # settings that decide nothing about the bytes, and the two that the recipe itself says
    "model", "out", "overwrite", "dry_run", "threads", "processes", "shard", "workers", "resume",
    "save_every", "keep_last", "max_time", "track", "rank_timeout",
}  # fmt: skip


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
    found = step.model_dump(mode="json", exclude=_LEFT - type(step).decides)
    for name in _PATHS:
        if isinstance(found.get(name), str):
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
