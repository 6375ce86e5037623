"""Run a recipe: each step's output is the next one's input; finished steps are skipped."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsparse import verbs
from lpsparse.artefact import recorded
from lpsparse.checkpoint.finding import locate
from lpsparse.checkpoint.manifest import Manifest, digest, list_files, read_manifest
from lpsparse.checkpoint.opening import Checkpoint, open_checkpoint
from lpsparse.checkpoint.writer import MANIFEST
from lpsparse.errors import InputError, OutputError
from lpsparse.recipe import (
    POSITIONAL,
    STEPS,
    EvalStep,
    FinetuneStep,
    PackStep,
    PruneStep,
    ReportStep,
    Step,
    UnpackStep,
    VerifyStep,
)
from lpsparse.recipe_file import Recipe, overrides_of, read_recipe
from lpsparse.reporting.records import Report
from lpsparse.settings import resolve

Say = Callable[[str], None]
_WRITES = (FinetuneStep, PruneStep, PackStep, UnpackStep)


@dataclass(frozen=True, slots=True)
class Done:
    """One step of a recipe, and what came of it."""

    name: str
    step: Step
    result: Report | dict[str, Any]
    skipped: bool = False


def run(
    recipe: str | Path,
    overrides: Mapping[str, str] | None = None,
    say: Say = lambda _: None,
    on_step: Callable[[Any], None] = lambda _: None,
) -> list[Done]:
    """Run every step of a recipe file;
    `overrides` are `--set` pairs such as {"model": ..., "prune.sparsity": ...}.

    Raises what the steps raise. A verdict (budget, verification) does not stop the later steps: look at the
    results.
    """
    return list(run_each(recipe, overrides, say, on_step))


def run_each(
    recipe: str | Path,
    overrides: Mapping[str, str] | None = None,
    say: Say = lambda _: None,
    on_step: Callable[[Any], None] = lambda _: None,
) -> Iterator[Done]:
    """`run`, giving each step's result as soon as it is there."""
    path = Path(recipe)
    read = read_recipe(path, overrides or {})
    steps = planned(read, overrides or {}, path)
    fresh = not read.out.exists()
    try:
        read.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(404, f"{read.out}: {error.strerror}", mend="choose another out") from error
    try:
        yield from _run(steps, say, on_step)
    finally:
        if fresh and read.out.is_dir() and not any(read.out.iterdir()):
            read.out.rmdir()  # a first step that failed leaves nothing behind


def _run(steps: list[tuple[int, str, Step]], say: Say, on_step: Callable[[Any], None]) -> Iterator[Done]:
    for i, name, step in steps:
        say(f"[{i + 1}/{len(steps)}] {command_line(name, step)}")
        if isinstance(step, _WRITES) and is_finished(step):
            say(f"  finished already: {step.out}")
            named = read_manifest(step.out).source.name
            result = verbs.report(step.out).model_copy(update={"model": named})
            yield Done(name, step, result, skipped=True)
        elif isinstance(step, _WRITES) and (step.out / MANIFEST).is_file() and not step.overwrite:
            what = f"{step.out}: holds what other settings, data or another input made"
            mend = f"choose another --set out=FOLDER, or replace it: --set {name}.overwrite=true"
            raise OutputError(401, what, mend=mend)
        else:
            yield Done(name, step, execute(step, say, on_step))


def planned(read: Recipe, overrides: Mapping[str, str], path: Path) -> list[tuple[int, str, Step]]:
    """The steps of a recipe with every default, override and folder filled in."""
    locate(read.model)  # a model that cannot be had fails before anything is made
    if read.out.exists() and not read.out.is_dir():
        raise OutputError(401, f"{read.out}: is a file", mend="choose another --set out=FOLDER")
    steps: list[tuple[int, str, Step]] = []
    current = read.model
    for i, entry in enumerate(read.steps):
        name, values = next(iter(entry.items()))
        kind = STEPS[name]
        settings: dict[str, Any] = {"model": current, **(values or {})}
        if "data" in kind.model_fields and read.data is not None:
            settings.setdefault("data", read.data)
        if kind is ReportStep:
            settings.setdefault("base", read.model)
        given = {"model": settings.pop("model"), **overrides_of(name, values, overrides)}
        if "out" in kind.model_fields:
            given["out"] = read.out / str(given.get("out", settings.get("out", f"{i + 1}-{name}")))
        step = resolve(kind, given, settings, where=f"{path}: steps[{i}].{name}")
        step = _beside(step, path.parent)
        steps.append((i, name, step))
        current = str(step.out) if isinstance(step, _WRITES) else current
    return steps


def _beside(step: Step, folder: Path) -> Step:
    """A model file named in a recipe is looked for beside the recipe."""
    model_fn = getattr(step, "model_fn", None)
    if model_fn is None or not model_fn.partition(":")[0].endswith(".py"):
        return step
    file = Path(model_fn.rpartition(":")[0])
    if file.is_absolute() or file.exists() or not (folder / file).is_file():
        return step
    return step.model_copy(update={"model_fn": f"{folder / file}:{model_fn.rpartition(':')[2]}"})


def execute(step: Step, say: Say, on_step: Callable[[Any], None]) -> Report | dict[str, Any]:
    """One step, by its kind."""
    if isinstance(step, FinetuneStep):
        return verbs.finetune_step(step, say, on_step)
    if isinstance(step, EvalStep):
        return verbs.evaluate_step(step, say)
    with verbs.together():
        if isinstance(step, PruneStep):
            return verbs.prune_step(step, say)
        if isinstance(step, (PackStep, UnpackStep)):
            return verbs.pack_step(step, say)
        if isinstance(step, VerifyStep):
            return verbs.verify_step(step, say)
        assert isinstance(step, ReportStep)
        return verbs.report_step(step, say)


def passed(done: list[Done]) -> bool:
    """Whether every report met its budgets and every verification held."""
    return all(
        each.result.passed if isinstance(each.result, Report) else each.result.get("ok", True)
        for each in done
    )


def is_finished(step: Any) -> bool:
    """OUT holds the result of this very step on this very input and data, by its manifest and its hashes."""
    if not (step.out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(step.out)
        files = {path.relative_to(step.out).as_posix(): path for path in list_files(step.out)}
        whole = all(
            record.name in files and digest(files[record.name], step.out) == record
            for record in manifest.files
        )
        return whole and manifest.recipe == recorded(step) and _same_source(manifest, step)
    except (InputError, OSError):
        return False


def _same_source(manifest: Manifest, step: Any) -> bool:
    opened: Checkpoint = open_checkpoint(step.model, step.weights)
    return tuple(digest(path, path.parent) for path in opened.files) == manifest.source.files


def command_line(name: str, step: Step) -> str:
    """The command that a person would type for this step."""
    import shlex

    positional = [str(getattr(step, key)) for key in POSITIONAL if getattr(step, key, None) is not None]
    return shlex.join(["lpsparse", name, *positional, *step.options()])
