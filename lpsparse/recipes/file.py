"""Recipes in YAML: a file in, checked steps out."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from lpsparse.errors import InputError, UsageError
from lpsparse.safe_yaml import read_yaml
from lpsparse.steps.base import MODEL
from lpsparse.steps.resolve import resolve
from lpsparse.steps.table import RECIPE_WORDS, step_of

# ${NAME} anywhere, or a path that begins with ~ or $NAME: what a shell would put in place of it, we do not.
SHELL = re.compile(r"\$\{|^(?:~[^/\s]*|\$\w+)(?:/|$)")


class Recipe(BaseModel):
    """A list of steps; each step's output is the next one's input."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    model: str = MODEL
    data: str | None = Field(None, description="Data of the steps that name none.")
    out: Path = Field(Path("lpsparse-run"), description="Folder that gets one folder a step.")
    steps: tuple[dict[str, dict[str, Any] | None], ...] = Field(min_length=1)


def read_recipe(path: Path, overrides: Mapping[str, str]) -> Recipe:
    """A checked recipe file, with `--set key=value` applied.
    Raises UsageError naming file, key and nearest key."""
    if not path.is_file():
        raise InputError(360, f"{path}: no such recipe", hint="give a YAML file, such as recipes/demo.yaml")
    if path.stat().st_size > 1_000_000:
        raise UsageError(
            205, f"{path}: {path.stat().st_size} bytes is too large for a recipe", hint="shorten it"
        )
    try:
        table = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UsageError(205, f"{path}: not valid YAML: {error}", hint="fix the file") from None
    if not isinstance(table, dict):
        raise UsageError(205, f"{path}: not a table of keys", hint="start from a file under recipes/")
    _check_literal(str(path), table)
    for key, value in overrides.items():
        _check_literal(f"--set {key}", value)
    top = {key: value for key, value in overrides.items() if "." not in key}
    recipe = resolve(Recipe, top, table, where=str(path))  # pyright: ignore[reportUnknownArgumentType]
    for i, step in enumerate(recipe.steps):
        _check_step(path, i, step, overrides)
    known = [word for step in recipe.steps for word in _prefixes(*next(iter(step.items())))]
    for key in overrides:
        prefix = key.partition(".")[0]
        if "." in key and prefix not in known:
            near = get_close_matches(prefix, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"steps are {', '.join(dict.fromkeys(known))}"
            raise UsageError(208, f"--set {key}: the recipe has no step {prefix!r}", hint=hint)
    return recipe


def _check_literal(where: str, value: Any) -> None:
    """Refuse text that stands for something else: it would be taken as it is, or quietly for another thing on
    another machine."""
    if isinstance(value, str) and SHELL.search(value):
        what = f"{where}: {value!r}: variables and ~ are not expanded in recipes"
        raise UsageError(281, what, hint="write the value out, or let the shell do it: --set KEY=VALUE")
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value).items()
    elif isinstance(value, list):
        entries = enumerate(cast("list[Any]", value))
    for key, inner in entries:
        _check_literal(f"{where}: {key}" if isinstance(value, dict) else f"{where}[{key}]", inner)


def overrides_of(name: str, values: Mapping[str, Any] | None, overrides: Mapping[str, str]) -> dict[str, str]:
    """The `--set` pairs meant for one step: `STEP.KEY` is for every step of that name,
    `OUT.KEY` for the one whose `out` is so called, and wins."""
    given: dict[str, str] = {}
    for prefix in _prefixes(name, values):
        given |= {k.partition(".")[2]: v for k, v in overrides.items() if k.startswith(f"{prefix}.")}
    return given


def _prefixes(name: str, values: Mapping[str, Any] | None) -> list[str]:
    return [name, *([str(values["out"])] if values and "out" in values else [])]


def _check_step(
    path: Path, i: int, step: dict[str, dict[str, Any] | None], overrides: Mapping[str, str]
) -> None:
    where = f"{path}: steps[{i}]"
    if len(step) != 1:
        raise UsageError(
            206, f"{where}: one step name is needed, got {', '.join(step) or 'none'}", hint="split it"
        )
    name, values = next(iter(step.items()))
    if name not in RECIPE_WORDS:
        near = get_close_matches(name, RECIPE_WORDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known steps: {', '.join(RECIPE_WORDS)}"
        raise UsageError(202, f"{where}: unknown step {name!r}", hint=hint)
    given = overrides_of(name, values, overrides)
    known = {info.alias or key for key, info in step_of(name).model_fields.items()}
    filled = {"model": "-", "out": "-", "data": "-"}
    resolve(
        step_of(name),
        given,
        {k: v for k, v in filled.items() if k in known} | (values or {}),
        f"{where}.{name}",
    )
