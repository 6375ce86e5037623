"""One function a command: a checkpoint in, a verified checkpoint or a report out.
The command line calls only these.

Torch is imported where training begins, nowhere else.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

from lpsparse.artefact import Say, check_same, complete, recorded, stamps_of, writing
from lpsparse.checkpoint.counting import count_all
from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.manifest import Quality, hash_of, own_manifest, read_manifest, source_of
from lpsparse.checkpoint.opening import Checkpoint, open_checkpoint
from lpsparse.checkpoint.preflight import check_output
from lpsparse.checkpoint.rescue import LAYOUTS
from lpsparse.checkpoint.rewrite import follow, rewrite
from lpsparse.checkpoint.threads import of_each, of_one, using
from lpsparse.checkpoint.writer import MANIFEST
from lpsparse.dry_run import foretell, foretell_unread
from lpsparse.errors import InputError, UsageError, VerdictError
from lpsparse.pruning.plan import plan_prune
from lpsparse.pruning.prunable import kept_in_words
from lpsparse.pruning.quantised import refuse_quantised
from lpsparse.recipe import (
    EvalStep,
    FinetuneStep,
    InspectStep,
    PackStep,
    PruneStep,
    PushStep,
    ReportStep,
    UnpackStep,
    VerifyStep,
    flag,
    pair,
)
from lpsparse.reporting import text
from lpsparse.reporting.budgets import check_baseline, check_budgets
from lpsparse.reporting.changes import changes
from lpsparse.reporting.check import check_against, check_folder, check_weights
from lpsparse.reporting.history import read_history
from lpsparse.reporting.measure import (
    compare,
    identity_of,
    made_by,
    measure,
    not_measured,
    own_quality,
    prunable_of,
)  # fmt: skip
from lpsparse.reporting.records import Report
from lpsparse.reporting.reread import is_report, read_report
from lpsparse.reporting.spectra import spectra
from lpsparse.settings import (
    as_launched,
    is_first,
    is_launched,
    is_one_of_several,
    name_as_launched,
    resolve,
)

_OF_FILES = ("base", "weights", "include", "exclude", "spectra")  # what a written report has no more
S = TypeVar("S", PruneStep, PackStep, PackStep | UnpackStep, ReportStep, VerifyStep)
R = TypeVar("R")


@contextmanager
def together() -> Generator[None]:
    """Have the processes of a launched job (torchrun, accelerate, srun), which all come here, share the work
    of prune, pack, unpack, verify and report inside, over a file system that all of them see. Alone it does
    nothing. Raises ResourceError when one of them is gone.
    """
    name_as_launched()
    if not is_one_of_several():
        yield
        return
    from lpsparse import distributed  # and torch with it

    with distributed.together():
        yield


def silent(_: Any) -> None:
    """Says nothing. Given as `say`, processes that a step starts are silent too."""


def _on_threads(verb: Callable[[S, Say], R]) -> Callable[..., R]:
    """The verb, on the step's own number of threads. Raises InputError for a disk that cannot be read."""

    @wraps(verb)
    def run(step: S, say: Say = silent) -> R:
        try:
            with using(step.threads):
                return verb(step, say)
        except OSError as error:  # what cannot be written is an OutputError by now
            what = f"{error.filename or step.model}: {error.strerror or error}"
            raise InputError(338, what, mend="check the disk that it is on, and run again") from error

    return run


def prune(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Cut the smallest weights of `model` to exact zeros and write `out`.
    Options: fields of recipe.PruneStep."""
    return cast("Report", prune_step(resolve(PruneStep, {"model": str(model), "out": out, **options})))


def pack(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Store `model` losslessly in a packed layout. Options: fields of recipe.PackStep."""
    return pack_step(resolve(PackStep, {"model": str(model), "out": out, **options}))


def unpack(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Store `model` densely again, bit for bit. Options: fields of recipe.UnpackStep."""
    return pack_step(resolve(UnpackStep, {"model": str(model), "out": out, **options}))


def finetune(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Train `model` so that weights go to zero, and write `out`. Options: fields of recipe.FinetuneStep."""
    return cast("Report", finetune_step(resolve(FinetuneStep, {"model": str(model), "out": out, **options})))


def report(model: str | Path, base: str | Path | None = None, **options: Any) -> Report:
    """Measure `model`, and what it came from. Options: fields of recipe.ReportStep."""
    given = {"model": str(model), "base": None if base is None else str(base), **options}
    return report_step(resolve(ReportStep, given))


def verify(model: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Check a folder against its manifest, and what it was cut from: {"ok", "files", "tensors",
    "problems"}."""
    return verify_step(VerifyStep(model=str(model), source=None if source is None else str(source)))


def inspect(model: str | Path, **options: Any) -> dict[str, Any]:
    """What a checkpoint holds, from its headers. Options: fields of recipe.InspectStep."""
    return inspect_step(resolve(InspectStep, {"model": str(model), **options}))


def push(folder: str | Path, repo: str, **options: Any) -> dict[str, Any]:
    """Upload `folder`, which lpsparse wrote, to the hub: {"url", "commit", "files", "bytes", ...}.
    Options: fields of recipe.PushStep."""
    return push_step(resolve(PushStep, {"folder": folder, "repo": repo, **options}))


def evaluate(model: str | Path, **options: Any) -> dict[str, Any]:
    """Loss and accuracy of `model` on data. Options: fields of recipe.EvalStep."""
    return evaluate_step(resolve(EvalStep, {"model": str(model), **options}))


def open(path: str | Path, weights: str | None = None) -> Checkpoint:
    """A checkpoint of any kind, lazily: `.tensors`, or one as `found[name]`, each with name, dtype, shape,
    `.read()` and `.read_rows(first, last)`, which give raw bits as numpy arrays of unsigned integers.
    `weights` names the file or index in a folder of several."""
    return open_checkpoint(path, weights)


def load(path: str | Path, weights: str | None = None, *, check: bool = True) -> dict[str, Any]:
    """Every tensor of a checkpoint of any layout as a dense torch tensor, by name. A tied one is there under
    the names, too, that safetensors' save_model would have left out.

    Raises InputError where lpsparse wrote the folder and a weight file has not the hash that it then had;
    `check=False` trusts the bytes, as `open` does.
    """
    from lpsparse.training.model import LOADED_DTYPES, to_tensors

    checkpoint = open_checkpoint(path, weights)
    if check:
        check_weights(checkpoint)
    found = to_tensors(checkpoint.tensors, dtypes=LOADED_DTYPES)
    told = (item for metadata in checkpoint.metadata.values() for item in metadata.items())
    ties = {name: of for name, of in told if name != "format" and not name.startswith("lpsparse.")}
    return {name: found[of] for name, of in ties.items() if of in found} | found


@_on_threads
def prune_step(step: PruneStep, say: Say = silent) -> Report | dict[str, Any]:
    """With dry_run of a hub id that would have to be downloaded: what its headers tell, as plain data."""
    if step.dry_run and of_one(lambda: is_remote(step.model)):
        return of_one(lambda: foretell_unread(step, say))
    began = perf_counter()
    source = _open(step.model, say, step.weights)
    refuse_quantised(source)
    stamps = stamps_of(source)
    of_one(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    plan = plan_prune(
        source, sparsity=step.sparsity, below=step.below, gap=step.gap, n_m=pair(step.n_m),
        block=pair(step.block), scope=step.scope, include=step.include, exclude=step.exclude,
    )  # fmt: skip
    chosen = {name: (tensor.prunable, tensor.reason) for name, tensor in plan.tensors.items()}
    say(kept_in_words(chosen))
    if plan.band is not None:
        band = plan.band
        below = f"{band.below:,} of {band.total:,} weights below"
        wide = f" ({band.decades:.1f} decades)" if band.low > 0 else ": nothing between exact zeros and that"
        say(f"band from {band.low:.3g} to {band.high:.3g}{wide}, {below}")
    if plan.threshold is not None:
        say(f"threshold {plan.threshold:.6g}")
    if step.dry_run:
        say("dry run: nothing is written; the zeros are those that the cut would leave")
        decided = perf_counter()
        counts = count_all(source, plan.cut)
        took = (decided - began, perf_counter() - decided)
        return foretell(step, source, chosen, counts, took, plan.cut)
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        written = rewrite(source, folder, plan.cut, step.layout)
        counts = written.counts
        whole = [t.name for t in source.tensors if chosen[t.name][0] and counts[t.name].zeros == t.size]
        if whole:
            say(f"nothing is left of {', '.join(whole[:4])} ({len(whole)} tensors); --exclude would keep it")
        quality = own_quality(source)
        same = bool(quality) and counts == count_all(source)
        if quality and not same:
            say(
                "quality recorded in MODEL is left out: the cut changed weights; measure again with "
                "`lpsparse eval`"
            )
        return finish(written, quality if same else ())


@_on_threads
def pack_step(step: PackStep | UnpackStep, say: Say = silent) -> Report:
    source = _open(step.model, say, step.weights)
    if source.layout in LAYOUTS:
        refuse_quantised(source)
    stamps = stamps_of(source)
    chosen = of_each(lambda: prunable_of(source))
    of_one(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    if step.dry_run:
        say("dry run: nothing is written")
        began = perf_counter()
        counts = count_all(source)
        return foretell(step, source, chosen, counts, (0, perf_counter() - began))
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        layout, level = (step.layout, step.level) if isinstance(step, PackStep) else ("dense", "default")
        written = rewrite(source, folder, lambda _: None, layout, level=level, finite=False)
        for name, counted in written.counts.items():
            if counted.nonfinite:
                say(f"{name!r}: {counted.nonfinite} values are NaN or Inf: carried as they are")
        return finish(written, own_quality(source))


@_on_threads
def report_step(step: ReportStep, say: Say = silent) -> Report:
    """MODEL may be a report.json, too: what it says, with the budgets checked anew."""
    found = _reread(step) if is_report(step.model) else _measured(step, say)
    if step.baseline is not None:
        found = check_baseline(found, read_report(step.baseline), step)
    return check_budgets(found, step)


def _reread(step: ReportStep) -> Report:
    given = [flag(name) for name in _OF_FILES if not step.at_default(name)]
    if given:
        what = f"{step.model}: a report, which is not measured again: {', '.join(given)} cannot be had of it"
        raise UsageError(291, what, mend="give the checkpoint itself")
    return read_report(Path(step.model)).model_copy(update={"budgets": (), "baseline": None})


def _measured(step: ReportStep, say: Say) -> Report:
    checkpoint = _open(step.model, say, step.weights, needed=False)
    manifest = own_manifest(checkpoint)
    quality = () if manifest is None else manifest.quality
    found = measure(checkpoint, include=step.include, exclude=step.exclude, quality=quality)
    check_weights(checkpoint, found)
    if step.base is not None:
        found = _compared(step.base, checkpoint, found, step, say)
    if step.spectra:
        values = spectra(checkpoint, {row.name for row in found.tensors if row.prunable})
        rows = [row.model_copy(update={"spectrum": values.get(row.name)}) for row in found.tensors]
        found = found.model_copy(update={"tensors": tuple(rows)})
    more: dict[str, Any] = {
        "identity": identity_of(found, manifest.source.base_sha256 if manifest else None),
        "training": read_history(checkpoint.root),
        "not_measured": not_measured(found),
    }  # fmt: skip
    if manifest is not None:
        more["made"] = made_by(manifest, {path.name for path in checkpoint.files})
    return found.model_copy(update=more)


def _compared(model: str, checkpoint: Checkpoint, found: Report, step: ReportStep, say: Say) -> Report:
    base = _open(model, say)
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    if not any(shapes.get(tensor.name) == tensor.shape for tensor in checkpoint.tensors):
        what = f"{base.name}: has no tensor of the names and shapes of {checkpoint.name}: not comparable"
        raise InputError(353, what, mend="give the checkpoint that MODEL was made from as BASE")
    beside = measure(base, include=step.include, exclude=step.exclude)
    check_weights(base, beside)
    manifest = own_manifest(checkpoint)
    made_of = manifest and (hash_of(manifest.source.files), manifest.source.base_sha256)
    is_source = made_of is not None and hash_of(source_of(base).files) in made_of
    return compare(found, beside, changes(checkpoint, base), is_source=is_source)


@_on_threads
def verify_step(step: VerifyStep, say: Say = silent) -> dict[str, Any]:
    folder = Path(step.model)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(327, f"{folder}: {what}", mend="give a folder that lpsparse wrote")
    found = check_folder(folder)
    if step.source is not None and found["ok"]:
        found["problems"] = list(check_against(open_checkpoint(folder), _open(step.source, say)))
        found["ok"] = not found["problems"]
    return found


def inspect_step(step: InspectStep, say: Say = silent) -> dict[str, Any]:
    checkpoint = _open(step.model, say, step.weights, needed=False)
    chosen = prunable_of(checkpoint)
    tensors = [
        {
            "name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "file": tensor.file,
            "layout": tensor.layout, "bytes": tensor.stored_bytes, "prunable": chosen[tensor.name][0],
            "reason": chosen[tensor.name][1],
        }
        for tensor in checkpoint.tensors
    ]  # fmt: skip
    return {
        "model": checkpoint.name, "revision": checkpoint.revision, "layout": checkpoint.layout,
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in checkpoint.files],
        "weights": sum(tensor.size for tensor in checkpoint.tensors),
        "prunable_weights": sum(tensor.size for tensor in checkpoint.tensors if chosen[tensor.name][0]),
        "tensors": tensors, "notes": list(checkpoint.notes),
    }  # fmt: skip


def push_step(step: PushStep, say: Say = silent, *, bars: bool = False) -> dict[str, Any]:
    """With dry_run: {"files", "bytes", "names", ...}, and nobody is asked. `bars` lets huggingface_hub draw.

    Raises VerdictError where the folder is not what its manifest says.
    """
    from lpsparse.checkpoint.push import Target, check_access, choose_files, push_files

    folder = step.folder
    if folder.is_dir() and not step.dry_run:
        read_manifest(folder)
        check_access()  # both at once, the hashes take their time
    found = verify_step(VerifyStep(model=str(folder), source=None, threads=step.threads), say)
    if not found["ok"]:
        what = f"{folder}: is not what {MANIFEST} says: {found['problems'][0]}"
        raise VerdictError(102, what, mend="write it again; nothing was sent")
    files, stay = choose_files(folder)
    size = sum(record.size for record in files)
    if stay:
        say(f"not sent: {', '.join(stay[:4])}" + (f" and {len(stay) - 4} more" if len(stay) > 4 else ""))
    say(f"{len(files)} files, {text.size(size)}, to {step.repo}")
    if step.dry_run:
        names = [{"name": record.name, "bytes": record.size} for record in files]
        return {"repo": step.repo, "files": len(files), "bytes": size, "names": names}
    to = Target(
        step.repo, step.revision, step.private, step.message, step.create_pr, step.delete_others
    )  # fmt: skip
    return push_files(folder, files, to, say, bars=bars)


def evaluate_step(step: EvalStep, say: Say = silent) -> dict[str, Any]:
    source = _open(step.model, say, step.weights)
    from lpsparse.training.data import find
    from lpsparse.training.loop import prepare
    from lpsparse.training.quality import evaluate as measure_quality

    task = prepare(step, source)
    measured = measure_quality(step, task)
    split = find(step.data, step.split)[2]
    found: dict[str, Any] = {
        "model": source.name, "task": step.task, "split": split, "loss": measured.loss
    }  # fmt: skip
    if measured.accuracy is not None:
        found["accuracy"] = measured.accuracy
    return found | {task.unit: measured.count}


def finetune_step(
    step: FinetuneStep, say: Say = silent, on_step: Callable[[Any], None] = silent
) -> Report | dict[str, Any]:
    """Train and write. With dry_run: {"steps", "prunable_weights", ...} and nothing written.

    Every process of a launched job calls it; process 0 writes and speaks. With --processes it starts them.
    """
    step = as_launched(step)
    source = _open(step.model, say, step.weights)
    refuse_quantised(source)
    if is_first():
        check_output(
            step.out, source, 2 * source.dense_bytes, overwrite=step.overwrite, reads=_data_files(step)
        )
    if step.dry_run:
        from lpsparse.training.loop import plan_training, prepare

        say("dry run: nothing is written")
        return plan_training(step, prepare(step, source))
    if step.processes is not None and step.processes > 1 and not is_launched():
        return _launch(step, quiet=say is silent)
    from lpsparse.distributed import missing_others

    with missing_others():
        return _train(step, source, say, on_step)


def _train(step: FinetuneStep, source: Checkpoint, say: Say, on_step: Callable[[Any], None]) -> Report:
    from lpsparse import distributed
    from lpsparse.training import job
    from lpsparse.training.loop import prepare, start, train
    from lpsparse.training.model import trained_checkpoint

    distributed.end_with_launcher()
    start(step)
    task = prepare(step, source, spread=False)
    for note in task.loaded.notes:
        say(note)
    recipe = recorded(step)
    of_run = job.made_by(step, source, recipe)
    with job.training_folder(step) as folder:
        states = job.find_states(step, folder, of_run, say)
        with job.recording(step, states, on_step, say) as record:
            trained = train(step, task, record, say, states)
        written = trained_checkpoint(source, task.loaded)
        if not is_first():
            follow(written)
            distributed.wait()
            return report(step.out)
        with using(1):  # a sharded tensor is gathered by all processes, one after another
            result = rewrite(written, folder, lambda _: None, "dense")
        quality = Quality(
            metric=task.metric, before=trained.before.of(task.metric) if trained.before else None,
            after=trained.after.of(task.metric), higher_is_better=task.higher_is_better,
            rows=trained.after.count, split=f"{step.eval_split or 'held-out'} {task.unit}",
            before_error=trained.before.error_of(task.metric) if trained.before else None,
            after_error=trained.after.error_of(task.metric),
            data_sha256=job.held_out_hash(step, recipe["finetune"]),
        )  # fmt: skip
        chosen = {
            t.name: trained.prunable.get(t.name, (False, "not part of the model")) for t in written.tensors
        }
        notes = (*task.loaded.notes, trained.facts)
        record = source_of(source)
        check_same(record, of_run["model"])
        found = complete(step, source, record, folder, chosen, say, result, (quality,), task.sidecars, notes)
    distributed.wait()
    return found


def _launch(step: FinetuneStep, *, quiet: bool) -> Report:
    """The step in `step.processes` processes, which say what there is to say; then what is in OUT."""
    from lpsparse import distributed

    words = ["finetune", step.model, str(step.out), *step.options(), "--json"]
    words += ["--quiet"] if quiet else []
    distributed.launch(step.processes or 1, words)
    found = report(step.out)
    return found.model_copy(update={"model": read_manifest(step.out).source.name})


def _data_files(step: FinetuneStep) -> list[Path]:
    """What a fine-tune reads beside MODEL, as far as it is local."""
    named = [step.data, step.eval_data or "", (step.model_fn or "").rpartition(":")[0]]
    return [Path(text) for text in named if text and Path(text).exists()]


def _open(model: str, say: Say, weights: str | None = None, *, needed: bool = True) -> Checkpoint:
    """The checkpoint, its notes said. Raises InputError when it has no tensors, where some are needed."""
    checkpoint = of_each(lambda: open_checkpoint(model, weights))
    for note in checkpoint.notes:
        say(f"{checkpoint.name}: {note}")
    if not checkpoint.tensors and needed:
        raise InputError(335, f"{checkpoint.name}: holds no tensors", mend="give a checkpoint with weights")
    if not checkpoint.tensors:
        say(f"{checkpoint.name}: holds no tensors")
    return checkpoint
