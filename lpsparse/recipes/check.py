"""Look through a recipe before it runs: what can be known without training, writing, torch or a GPU."""

import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.files import MANIFEST, REPORT
from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.open import no_key, open_checkpoint
from lpsparse.checkpoint.preflight import check_place
from lpsparse.checkpoint.transaction import has_states, left_bytes, partial_of
from lpsparse.commands.checks import Checked, Held
from lpsparse.commands.report import check_reread
from lpsparse.errors import InputError, LpsparseError, OutputError
from lpsparse.families import RETIRED_LAYOUTS
from lpsparse.hub.headers import read_remote
from lpsparse.pruning.targets import refuse_quantised
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.outputs import check_free, report_file
from lpsparse.recipes.plan import Link, planned
from lpsparse.recipes.run import is_finished
from lpsparse.reporting.budgets.check import check_budgets
from lpsparse.reporting.estimate import PROCESS_BYTES, estimate
from lpsparse.reporting.history import is_report, read_report
from lpsparse.steps.base import about
from lpsparse.steps.table import COMMANDS

_SPARE = 1.05  # as preflight asks for
_ELSEWHERE = "choose another --set out=FOLDER"


@dataclass(slots=True)
class _Look:
    """What is found on the way through the steps."""

    made: dict[str, Held] = field(default_factory=dict[str, Held])  # by folder: what the steps so far make
    opened: dict[tuple[str | None, ...], Held] = field(default_factory=dict[tuple[str | None, ...], Held])
    fresh: set[str] = field(default_factory=set[str])  # folders that are not finished
    reports: set[Path] = field(default_factory=set[Path])  # that the report steps so far keep
    used: int = 0  # bytes of disk of the steps so far


def check_recipe(recipe: str | Path, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Look through a recipe file as `run` would go through it: {"steps": [...], "disk_bytes", "free_bytes",
    "memory_bytes", "download_bytes"}. Of a hub id that is not in the cache the headers alone are fetched.

    Raises what the run would raise: UsageError for settings, and patterns that match nothing; InputError for
    models and data; OutputError for folders in the way, and for a disk that is too small for all steps.
    """
    path = Path(recipe)
    read = read_recipe(path, overrides or {})
    links = planned(read, overrides or {}, path)
    check_free(read.out)
    place = _existing(read.out.absolute())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(404, f"{place}: no permission to write here", hint=_ELSEWHERE)
    free = shutil.disk_usage(place).free
    look = _Look()
    steps: list[dict[str, Any]] = []
    for link in links:
        with _naming(link):
            steps.append(_step(link, look, place, free))
            if link.name == "report":
                look.reports.add(report_file(link, links, read.out))
    return {
        "recipe": str(path),
        "out": str(read.out),
        "steps": steps,
        "disk_bytes": look.used,
        "free_bytes": free,
        "memory_bytes": max(step["memory_bytes"] for step in steps),
        "download_bytes": sum(held.download_bytes for held in look.opened.values()),
    }


@contextmanager
def _naming(link: Link) -> Generator[None]:
    """What goes wrong inside, with the step's place."""
    try:
        yield
    except LpsparseError as error:
        what = f"steps[{link.index}].{link.name}: {error.what}"
        raise type(error)(int(error.code[3:]), what, hint=error.hint) from error


def _step(link: Link, look: _Look, place: Path, free: int) -> dict[str, Any]:
    step, out, fields = link.step, link.out, type(link.step).model_fields
    if link.name == "report" and (Path(link.model) in look.reports or is_report(link.model)):
        return _reread(link, look)
    given = {key: getattr(step, key) for key in ("key", "weights", "baseline") if key in fields}
    own = None if about(type(step))["key"].needs else given["key"]  # else it is of the other checkpoint alone
    held = _take(link.model, given.get("weights"), own, look)
    others = [getattr(step, key) for key in ("base", "source", "against") if getattr(step, key, None)]
    for other in others:
        _take(other, None, given["key"], look)
    if own is not None and not others and not held.checkpoint.is_torch:
        raise no_key(link.model, own)
    if given.get("baseline") is not None:
        _check_baseline(given["baseline"], look)
    if held.checkpoint.layout in RETIRED_LAYOUTS:
        refuse_quantised(held.checkpoint)
    found: Checked = COMMANDS[step.command].load("check")(step, held)
    chosen, source = found.chosen, held.checkpoint
    prunable = None if chosen is None else sum(t.size for t in source.tensors if chosen[t.name].prunable)
    state = _state(link, held, look, place)
    needs = estimate(
        source,
        place / "out",
        weight_bytes=0 if out is None else source.dense_bytes,
        sidecar_bytes=held.sidecar_bytes,
        threads=getattr(step, "threads", None),
    )
    disk = 0 if out is None or state == "finished" else needs.disk_bytes
    if out is not None and state != "finished":
        most = look.used + disk + found.state_bytes
        _check_disk(out, most, look.used, free + left_bytes(out))
    look.used += disk
    if out is not None:
        made = Held(
            source, held.sidecar_bytes, renamed=found.renamed, chosen=chosen or held.chosen, made=True
        )
        look.made[str(out)] = made if state != "finished" else Held(open_checkpoint(out), made=True)
    return {
        "step": link.name,
        "model": link.model,
        "out": None if out is None else str(out),
        "state": state,
        "prunable_weights": prunable,
        "disk_bytes": disk,
        "memory_bytes": needs.memory_bytes if found.memory_bytes is None else found.memory_bytes,
        "notes": list(found.notes),
    }


def _reread(link: Link, look: _Look) -> dict[str, Any]:
    """A report step of a report.json, which is read when no step before makes it."""
    step: Any = link.step
    check_reread(step)
    if step.baseline is not None:
        _check_baseline(step.baseline, look)
    prunable = None
    if Path(step.model) not in look.reports:
        prunable = check_budgets(read_report(Path(step.model)), step).prunable.weights
    return {
        "step": "report",
        "model": step.model,
        "out": None,
        "state": "looks",
        "prunable_weights": prunable,
        "disk_bytes": 0,
        "memory_bytes": PROCESS_BYTES,
        "notes": [],
    }


def _check_baseline(baseline: Path, look: _Look) -> None:
    """Raises InputError where it is no report, and no step before makes it one."""
    folder = baseline.parent if baseline.name == REPORT else baseline
    if str(folder) not in look.made and baseline not in look.reports:
        read_report(baseline)


def _take(model: str, weights: str | None, key: str | None, look: _Look) -> Held:
    if model in look.made:
        return look.made[model]
    if (model, weights, key) not in look.opened:
        if is_remote(model):
            far = read_remote(model, weights)
            held = Held(far.checkpoint, far.sidecar_bytes, far.download_bytes)
        else:
            held = Held(open_checkpoint(model, weights, key, strict=False))
        if not held.checkpoint.tensors:
            what = f"{held.checkpoint.name}: holds no tensors"
            raise InputError(335, what, hint="give a checkpoint with weights")
        look.opened[model, weights, key] = held
    return look.opened[model, weights, key]


def _state(link: Link, held: Held, look: _Look, place: Path) -> str:
    """What `run` would find at OUT, and do. Raises OutputError for what it would refuse."""
    step, out = link.step, link.out
    if out is None:
        return "looks"
    again = link.model in look.fresh
    check_place(out, held.checkpoint, (), out.parent if out.parent.is_dir() else place)
    if (out / MANIFEST).is_file():
        if not again and not is_remote(link.model) and is_finished(step):
            return "finished"
        if step.at_default("overwrite"):
            what = f"{out}: was made with other settings, data or input"
            hint = f"choose another --set out=FOLDER, or replace it: --set {link.name}.overwrite=true"
            raise OutputError(401, what, hint=hint)
        look.fresh.add(str(out))
        return "replaced"
    if os.path.lexists(out):
        raise OutputError(401, f"{out}: exists already", hint=_ELSEWHERE)
    look.fresh.add(str(out))
    return "goes on" if has_states(partial_of(out)) else "new"


def _check_disk(out: Path, need: int, before: int, free: int) -> None:
    if need * _SPARE > free:
        steps = f", {before} of them for the earlier steps" if before else ""
        what = f"{out}: needs {need} bytes{steps}; {free} are free"
        raise OutputError(406, what, hint="free some space or choose another --set out=FOLDER")


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())
