"""Run a recipe: each step's output is the next one's input; finished steps are skipped."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.files import MANIFEST, write_beside
from lpsparse.checkpoint.manifest import Manifest, as_text, digest, list_files, read_manifest
from lpsparse.checkpoint.open import Checkpoint, locate, open_checkpoint
from lpsparse.commands.artefact import recorded
from lpsparse.commands.report import report_on
from lpsparse.commands.results import Result
from lpsparse.errors import InputError, OutputError
from lpsparse.parallel import environment
from lpsparse.parallel.environment import is_rank_0
from lpsparse.parallel.progress import Brief
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.outputs import check_free, earlier_reports, report_file, set_aside, write_resolved
from lpsparse.recipes.plan import Link, planned, trained_from
from lpsparse.reporting.records import Report
from lpsparse.steps.base import Step, about
from lpsparse.steps.table import COMMANDS

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Done:
    """One step of a recipe, and what came of it."""

    name: str
    step: Step
    result: Report | Result
    skipped: bool = False

    @property
    def report(self) -> Report | None:
        return self.result if isinstance(self.result, Report) else None

    @property
    def model(self) -> str:
        step: Any = self.step  # every kind of step in a recipe has a model
        return str(step.model)


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
    links = planned(read, overrides or {}, path)
    check_free(read.out)
    with set_aside(earlier_reports(links, read.out)):
        locate(read.model)  # a model that cannot be had fails before anything is made
        with folder_for(read.out):
            yield from _kept(links, read.out, say, on_step)
            if is_rank_0():
                write_resolved(read, links)


def _kept(links: Sequence[Link], out: Path, say: Say, on_step: Callable[[Any], None]) -> Iterator[Done]:
    """Each step in turn, and the reports of report steps in `out`."""
    for link, done in zip(links, run_links(links, say, on_step), strict=True):
        if isinstance(done.result, Report) and link.name == "report" and is_rank_0():
            write_beside(report_file(link, links, out), as_text(done.result))
        yield done


@contextmanager
def folder_for(out: Path) -> Generator[None]:
    """The folder that gets one folder a step; a first step that failed leaves nothing behind."""
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(404, f"{out}: {error.strerror}", hint="choose another out") from error
    try:
        yield
    finally:
        if fresh and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def run_links(
    links: Sequence[Link], say: Say, on_step: Callable[[Any], None], among: Sequence[Link] = ()
) -> Iterator[Done]:
    """Each step in turn, or what it made when it ran before. `among` are all steps of the recipe, where
    `links` are not."""
    among = among or links
    for link in links:
        step, out = link.step, link.out
        head = f"[{link.index + 1}/{len(among)}] "
        say(Brief(head + in_short(link.name, step), head + command_line(step)))
        base = getattr(step, "base", None)
        if base is not None:
            beside = trained_from(link, among)
            quality = f", quality too if it was measured on the same data, else with {beside}"
            say(f"  bytes are compared with {base}" + (quality if beside not in (None, base) else ""))
        if out is not None and is_finished(step):
            say(f"  finished already: {out}")
            yield Done(link.name, step, report_on(out), skipped=True)
        elif out is not None and (out / MANIFEST).is_file() and step.at_default("overwrite"):
            what = f"{out}: was made with other settings, data or input"
            hint = f"choose another --set out=FOLDER, or replace it: --set {link.name}.overwrite=true"
            raise OutputError(401, what, hint=hint)
        else:
            yield Done(link.name, step, execute(step, say, on_step))


def execute(step: Step, say: Say, on_step: Callable[[Any], None]) -> Report | Result:
    """One step, by the function that its command names."""
    run = COMMANDS[step.command].load("run")
    if step.trains:
        return run(step, say, on_step)
    with nullcontext() if step.measures else environment.together():
        return run(step, say)


def passed(done: list[Done]) -> bool:
    """Whether every report met its budgets and every verification held."""
    return all(getattr(each.result, "passed", getattr(each.result, "ok", True)) for each in done)


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
        return whole and _same_settings(manifest, step) and _same_source(manifest, step)
    except (InputError, OSError):
        return False


def _same_settings(manifest: Manifest, step: Any) -> bool:
    """A setting that was not there when the manifest was written had its default."""
    (name, wanted), *_ = recorded(step).items()
    known = manifest.recipe.get(name, {})
    added = {key: value for key, value in wanted.items() if key not in known and step.at_default(key)}
    return {**known, **added} == wanted and list(manifest.recipe) == [name]


def _same_source(manifest: Manifest, step: Any) -> bool:
    opened: Checkpoint = open_checkpoint(step.model, step.weights, step.key)
    return tuple(digest(path, path.parent) for path in opened.files) == manifest.source.files


def in_short(name: str, step: Step) -> str:
    """A step on one line: what it makes, or reads, and the options that say how much."""
    out = step.destination
    where = getattr(step, "model", "") if out is None else f"-> {out}"
    headline = [name for name, known in about(type(step)).items() if known.headline]
    told = " ".join(step.options(headline)).replace(" --", ", --")
    return f"{name} {where}{f' ({told})' if told else ''}"


def command_line(step: Step) -> str:
    """The command that a person would type for this step."""
    import shlex

    return shlex.join(["lpsparse", step.command, *step.arguments(), *step.options()])
