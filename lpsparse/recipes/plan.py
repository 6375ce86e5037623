"""The steps of a recipe with everything filled in: which model each takes, and where its result goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.names import is_report_name
from lpsparse.errors import OutputError, UsageError
from lpsparse.recipes.file import Recipe, overrides_of
from lpsparse.steps.base import Step, about
from lpsparse.steps.resolve import resolve
from lpsparse.steps.table import step_of


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a recipe."""

    index: int
    name: str  # as the recipe says it
    step: Step
    origin: str  # the model that the chain of its input began with
    called: str  # what the recipe calls its result; empty where it writes none

    @property
    def model(self) -> str:
        step: Any = self.step  # every kind of step in a recipe has a model
        return str(step.model)

    @property
    def out(self) -> Path | None:
        return self.step.destination


def planned(read: Recipe, overrides: Mapping[str, str], path: Path) -> list[Link]:
    """The steps of a recipe with every default, override and folder filled in. No model is looked for.

    A step takes what the last step before it that writes has made. `model` in a step names another model, or
    the `out` of an earlier step, and the steps after it go on from its result; `base`, `source`,
    `baseline` and `against` may name such an `out`, too. An eval's task is that of the fine-tune
    before it. A report's `base` is the model that its own chain began with.
    """
    if read.out.exists() and not read.out.is_dir():
        raise OutputError(401, f"{read.out}: is a file", hint="choose another --set out=FOLDER")
    links: list[Link] = []
    current = read.model
    for i in range(len(read.steps)):
        link = _linked(read, overrides, path, i, links, current)
        _check_place(f"{path}: steps[{i}].{link.name}", link, links)
        links.append(link)
        current = str(link.out or current)
    return links


def _linked(
    read: Recipe, overrides: Mapping[str, str], path: Path, i: int, before: Sequence[Link], current: str
) -> Link:
    name, values = next(iter(read.steps[i].items()))
    kind, where = step_of(name), f"{path}: steps[{i}].{name}"
    settings = {"model": current, **(values or {})}
    given = {"model": settings.pop("model"), **overrides_of(name, values, overrides)}
    for key in made_keys(kind):
        for table in (settings, given):
            if isinstance(table.get(key), str):
                table[key] = _made(table[key], before)
    origin = next((link.origin for link in before if str(link.out) == given["model"]), given["model"])
    if "data" in kind.model_fields and read.data is not None:
        settings.setdefault("data", read.data)
    if "base" in kind.model_fields and _can_be_base(origin, {**settings, **given}, before):
        settings.setdefault("base", origin)
        settings.setdefault("key", _key_of(given["model"], before))
    if kind.measures:
        trained = _trained(given["model"], before)
        if {**settings, **given}.get("task") in (None, trained.get("task")):
            settings = trained | settings
    if kind.same_selection and not {"include", "exclude"} & {*settings, *given}:
        settings |= _patterns(given["model"], before)
    called = ""
    if "out" in kind.model_fields:
        called = str(given.get("out", settings.get("out", f"{i + 1}-{name}")))
        given["out"] = read.out / called
    step = _beside(resolve(kind, given, settings, where=where), path.parent)
    if getattr(step, "dry_run", False):
        hint = "leave it out; `lpsparse recipe check` looks without writing"
        raise UsageError(282, f"{where}: dry_run leaves nothing for the steps after it", hint=hint)
    if getattr(step, "component", ()):
        hint = "give the component as the step's model: model: PIPELINE/unet"
        raise UsageError(282, f"{where}: component makes no model for the steps after it", hint=hint)
    return Link(i, name, step.as_command(), origin, called)


def made_keys(kind: type[Step]) -> list[str]:
    """The settings that may name what an earlier step makes."""
    return [name for name, known in about(kind).items() if known.is_made]


def _can_be_base(origin: str, values: Mapping[str, Any], before: Sequence[Link]) -> bool:
    """Whether a report can be compared with `origin`: not where it is a report itself, nor where a step says
    by `weights` which checkpoint in it is meant, as `base` cannot."""
    if is_report_name(origin) and not Path(origin).is_dir():
        return False
    of_ours = values["model"] == origin and values.get("weights") is not None
    named = (link for link in before if link.model == origin)
    return not of_ours and all(getattr(link.step, "weights", None) is None for link in named)


def _key_of(model: str, before: Sequence[Link]) -> str | None:
    """The `key` by which the steps that led to `model` opened what they began with."""
    link = next((link for link in before if str(link.out) == model), None)
    return None if link is None else _key_of(link.model, before) or getattr(link.step, "key", None)


def _made(text: str, before: Sequence[Link]) -> str:
    """The folder of the earlier step whose result is so called; else the text itself."""
    return next((str(link.out) for link in before if link.called and link.called == text), text)


def _patterns(model: str, before: Sequence[Link]) -> dict[str, Any]:
    """Which tensors may be cut, of the step whose zeros are in `model`."""
    link = next((link for link in before if str(link.out) == model), None)
    if link is None:
        return {}
    if link.step.restores:
        return _patterns(link.model, before)
    return {name: getattr(link.step, name) for name in ("include", "exclude")}


def _trained(model: str, before: Sequence[Link]) -> dict[str, Any]:
    """What the last fine-tune of the recipe that led to `model` was told of its task and data."""
    link = next((link for link in before if str(link.out) == model), None)
    if link is None:
        return {}
    if link.step.trains:
        known = about(type(link.step))
        return {name: getattr(link.step, name) for name, each in known.items() if each.inherited}
    return _trained(link.model, before)


def _check_place(where: str, link: Link, before: Sequence[Link]) -> None:
    """Raises UsageError where the results of two steps would are inside one another."""
    if link.out is None:
        return
    mine = link.out.absolute()
    for other in before:
        if other.out is None:
            continue
        theirs = other.out.absolute()
        if mine == theirs or theirs in mine.parents or mine in theirs.parents:
            what = f"{where}: out {link.out} and {other.out} of steps[{other.index}] are inside one another"
            raise UsageError(283, what, hint="give each step its own out")


def _beside(step: Step, folder: Path) -> Step:
    """A model file named in a recipe is looked for beside the recipe."""
    model_fn = getattr(step, "model_fn", None)
    if model_fn is None or not model_fn.partition(":")[0].endswith(".py"):
        return step
    file = Path(model_fn.rpartition(":")[0])
    if file.is_absolute() or file.exists() or not (folder / file).is_file():
        return step
    return step.model_copy(update={"model_fn": f"{folder / file}:{model_fn.rpartition(':')[2]}"})


def trained_from(link: Link, links: Sequence[Link]) -> str | None:
    """The model beside which the quality of this step's model was measured: what the last finetune before it
    began with. None where no step of the recipe trained it."""
    maker = next((each for each in links if str(each.out) == link.model), None)
    if maker is None or maker.step.trains:
        return None if maker is None else maker.model
    return trained_from(maker, links)
