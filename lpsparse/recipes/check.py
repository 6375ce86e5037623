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
from lpsparse.checkpoint.manifest import own_manifest, read_manifest
from lpsparse.checkpoint.open import Checkpoint, no_key, open_checkpoint
from lpsparse.checkpoint.preflight import check_keeps, check_place
from lpsparse.checkpoint.transaction import has_states, left_bytes, partial_of
from lpsparse.commands.report import check_reread
from lpsparse.errors import InputError, LpsparseError, OutputError
from lpsparse.families import RETIRED_LAYOUTS
from lpsparse.hub.headers import read_remote
from lpsparse.pruning.targets import Chosen, refuse_quantised
from lpsparse.recipes.check_data import check_data
from lpsparse.recipes.check_patterns import check_patterns
from lpsparse.recipes.file import read_recipe
from lpsparse.recipes.outputs import check_free, report_file
from lpsparse.recipes.plan import WRITES, Link, planned
from lpsparse.recipes.run import is_finished
from lpsparse.reporting.budgets import check_budgets
from lpsparse.reporting.estimate import PROCESS_BYTES, estimate
from lpsparse.reporting.history import is_report, read_report
from lpsparse.steps.base import Step
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.report import ReportStep, VerifyStep
from lpsparse.steps.resolve import as_trained
from lpsparse.training import memory

_SPARE = 1.05  # as preflight asks for
_ELSEWHERE = "choose another --set out=FOLDER"


@dataclass(frozen=True, slots=True)
class _Held:
    """A checkpoint that a step would take, as far as its headers tell."""

    checkpoint: Checkpoint
    sidecar_bytes: int | None = None  # of one that is not here; else they are looked at
    download_bytes: int = 0
    renamed: bool = False  # a new head is added on the way: names may get a prefix
    chosen: Chosen | None = None  # what its manifest will say is prunable, where a step chose


@dataclass(slots=True)
class _Look:
    """What is found on the way through the steps."""

    made: dict[str, _Held] = field(default_factory=dict[str, _Held])  # by folder: what the steps so far make
    opened: dict[tuple[str | None, ...], _Held] = field(default_factory=dict[tuple[str | None, ...], _Held])
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
            if isinstance(link.step, ReportStep):
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
    step = link.step
    if isinstance(step, ReportStep) and (Path(step.model) in look.reports or is_report(step.model)):
        return _reread(step, look)
    if isinstance(step, VerifyStep) and step.model not in look.made:
        read_manifest(Path(step.model))
    key = getattr(step, "key", None)
    own = None if isinstance(step, VerifyStep) else key  # it is of SOURCE alone
    held = _take(link.model, getattr(step, "weights", None), own, look)
    others = [getattr(step, name) for name in ("base", "source", "against") if getattr(step, name, None)]
    for other in others:
        _take(other, None, key, look)
    if own is not None and not others and not held.checkpoint.is_torch:
        raise no_key(link.model, own)
    if isinstance(step, EvalStep):
        step = _as_trained(step, held.checkpoint, made=step.model in look.made)
    if isinstance(step, ReportStep) and step.baseline is not None:
        _check_baseline(step.baseline, look)
    if isinstance(step, (FinetuneStep, PruneStep)) or held.checkpoint.layout in RETIRED_LAYOUTS:
        refuse_quantised(held.checkpoint)
    notes = check_data(step, held.checkpoint) if isinstance(step, (FinetuneStep, EvalStep)) else []
    chosen, more, renamed = check_patterns(step, held.checkpoint, held.chosen, renamed=held.renamed)
    prunable = (
        None if chosen is None else sum(t.size for t in held.checkpoint.tensors if chosen[t.name].prunable)
    )
    state = _state(link, held, look, place)
    disk, most, memory_bytes = _needs(step, held, place, prunable)
    if state == "finished":
        disk = most = 0
    elif isinstance(step, WRITES):
        _check_disk(step.out, look.used + most, look.used, free + left_bytes(step.out))
    look.used += disk
    if isinstance(step, WRITES):
        made = _Held(held.checkpoint, held.sidecar_bytes, renamed=renamed, chosen=chosen or held.chosen)
        look.made[str(step.out)] = made if state != "finished" else _Held(open_checkpoint(step.out))
    return {
        "step": link.name,
        "model": link.model,
        "out": None if link.out is None else str(link.out),
        "state": state,
        "prunable_weights": prunable,
        "disk_bytes": disk,
        "memory_bytes": memory_bytes,
        "notes": [*notes, *more],
    }


def _as_trained(step: EvalStep, source: Checkpoint, *, made: bool) -> EvalStep:
    """What it will be when it runs. Of a model that a step before makes, the recipe has said all."""
    manifest = None if made else own_manifest(source)
    if step.save and not made:
        check_keeps(source)
    return as_trained(step, {} if manifest is None else manifest.training)


def _reread(step: ReportStep, look: _Look) -> dict[str, Any]:
    """A report step of a report.json, which is read when no step before makes it."""
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


def _take(model: str, weights: str | None, key: str | None, look: _Look) -> _Held:
    if model in look.made:
        return look.made[model]
    if (model, weights, key) not in look.opened:
        if is_remote(model):
            far = read_remote(model, weights)
            held = _Held(far.checkpoint, far.sidecar_bytes, far.download_bytes)
        else:
            held = _Held(open_checkpoint(model, weights, key, strict=False))
        if not held.checkpoint.tensors:
            what = f"{held.checkpoint.name}: holds no tensors"
            raise InputError(335, what, hint="give a checkpoint with weights")
        look.opened[model, weights, key] = held
    return look.opened[model, weights, key]


def _state(link: Link, held: _Held, look: _Look, place: Path) -> str:
    """What `run` would find at OUT, and do. Raises OutputError for what it would refuse."""
    step = link.step
    if not isinstance(step, WRITES):
        return "looks"
    out, again = step.out, step.model in look.fresh
    check_place(out, held.checkpoint, (), out.parent if out.parent.is_dir() else place)
    if (out / MANIFEST).is_file():
        if not again and not is_remote(step.model) and is_finished(step):
            return "finished"
        if not step.overwrite:
            what = f"{out}: holds what other settings, data or another input made"
            hint = f"choose another --set out=FOLDER, or replace it: --set {link.name}.overwrite=true"
            raise OutputError(401, what, hint=hint)
        look.fresh.add(str(out))
        return "replaced"
    if os.path.lexists(out):
        raise OutputError(401, f"{out}: exists already", hint=_ELSEWHERE)
    look.fresh.add(str(out))
    return "goes on" if has_states(partial_of(out)) else "new"


def _needs(step: Step, held: _Held, place: Path, prunable: int | None) -> tuple[int, int, int]:
    """Bytes of disk that stay, that are needed while it is written, and of memory."""
    source, writes = held.checkpoint, isinstance(step, WRITES)
    size = source.dense_bytes if writes else 0
    threads = getattr(step, "threads", None)
    needs = estimate(
        source, place / "out", weight_bytes=size, sidecar_bytes=held.sidecar_bytes, threads=threads
    )
    if not writes:
        counted = sum(tensor.size for tensor in source.tensors)
        return 0, 0, memory.of_measuring(counted) if isinstance(step, EvalStep) else needs.memory_bytes
    if not isinstance(step, FinetuneStep):
        return needs.disk_bytes, needs.disk_bytes, needs.memory_bytes
    trained, frozen = memory.trained_and_frozen(step, source.tensors)
    took = memory.estimate(
        step, trained=trained, frozen=frozen, prunable=prunable or 0, processes=step.processes or 1
    )
    return needs.disk_bytes, needs.disk_bytes + size, took.kept + took.peak  # a training state beside it


def _check_disk(out: Path, need: int, before: int, free: int) -> None:
    if need * _SPARE > free:
        steps = f", {before} of them for the steps before it" if before else ""
        what = f"{out}: needs {need} bytes{steps}; {free} are free"
        raise OutputError(406, what, hint="free some space or choose another --set out=FOLDER")


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())
