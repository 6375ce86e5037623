"""One function a command: a checkpoint in, a verified checkpoint or a report out.
The command line calls only these.

Torch is imported where training begins, nowhere else.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, cast, overload

from lpsparse.artefact import Say, called_after, check_left, emptied, stamps_of, writing
from lpsparse.checkpoint.components import asked_components
from lpsparse.checkpoint.counting import count_all
from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.checkpoint.opening import Checkpoint, open_checkpoint
from lpsparse.checkpoint.output import shared_folder
from lpsparse.checkpoint.preflight import check_output
from lpsparse.checkpoint.rescue import LAYOUTS
from lpsparse.checkpoint.rewrite import Written, rewrite
from lpsparse.checkpoint.writer import MANIFEST, copy_sidecars, find_sidecars
from lpsparse.dry_run import foretell, foretell_unread, say_left
from lpsparse.errors import VerdictError
from lpsparse.opened import on_threads, opened, silent
from lpsparse.parallel.environment import has_other_ranks, set_torch_names
from lpsparse.parallel.threads import on_rank_0
from lpsparse.proof import inspect_step, verify_step, write_report
from lpsparse.pruning.plan import plan_prune
from lpsparse.pruning.prunable import Chosen, kept_in_words
from lpsparse.pruning.quantised import refuse_quantised
from lpsparse.reporting import text
from lpsparse.reporting.check import check_weights
from lpsparse.reporting.measure import own_quality, prunable_of
from lpsparse.reporting.records import Report
from lpsparse.reporting.words import drained
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep, pair
from lpsparse.steps.push import PushStep
from lpsparse.steps.report import InspectStep, ReportStep, VerifyStep
from lpsparse.steps.resolve import resolve
from lpsparse.tuning import evaluate_step, finetune_step


@contextmanager
def together() -> Generator[None]:
    """Have the processes of a launched job (torchrun, accelerate, srun), which all come here, share the work
    of prune, pack, unpack, verify and report inside, over a file system that all of them see. Alone it does
    nothing. Raises ResourceError when one of them is gone.
    """
    set_torch_names()
    if not has_other_ranks():
        yield
        return
    from lpsparse.parallel import ranks  # and torch with it

    with ranks.together():
        yield


@overload  # the first that fits is taken
def prune(  # pyright: ignore[reportOverlappingOverload]
    model: str | Path, out: str | Path, *, component: str | Sequence[str], **options: Any
) -> dict[str, Report]: ...
@overload
def prune(model: str | Path, out: str | Path, **options: Any) -> Report: ...
def prune(model: str | Path, out: str | Path, **options: Any) -> Report | dict[str, Report]:
    """Cut the smallest weights of `model` to exact zeros and write `out`; given `component`, those of each of
    these components of a diffusers pipeline, with a report for each name.
    Options: fields of PruneStep."""
    step = resolve(PruneStep, {"model": str(model), "out": out, **options})
    return prune_components(step) if step.component else cast("Report", prune_step(step))


def pack(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Store `model` losslessly in a packed layout. Options: fields of PackStep."""
    return pack_step(resolve(PackStep, {"model": str(model), "out": out, **options}))


def unpack(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Store `model` densely again, bit for bit. Options: fields of UnpackStep."""
    return pack_step(resolve(UnpackStep, {"model": str(model), "out": out, **options}))


def finetune(model: str | Path, out: str | Path, **options: Any) -> Report:
    """Train `model` so that weights go to zero, and write `out`. Options: fields of FinetuneStep."""
    return cast("Report", finetune_step(resolve(FinetuneStep, {"model": str(model), "out": out, **options})))


def report(
    model: str | Path, base: str | Path | None = None, *, json: str | Path | None = None,
    html: str | Path | None = None, markdown: str | Path | None = None, comment: str | Path | None = None,
    junit: str | Path | None = None, csv: str | Path | None = None, **options: Any,
) -> Report:  # fmt: skip
    """Measure `model`, and what it came from; `json` to `csv` are files to write views of it to.
    Options: fields of ReportStep."""
    views = {
        "json": json, "html": html, "markdown": markdown, "comment": comment, "junit": junit, "csv": csv
    }  # fmt: skip
    files = {view: Path(file) for view, file in views.items() if file is not None}
    given = {"model": str(model), "base": None if base is None else str(base), **options}
    return write_report(resolve(ReportStep, given), files)


def verify(model: str | Path, source: str | Path | None = None, *, key: str | None = None) -> dict[str, Any]:
    """Check a folder against its manifest, and what it was cut from (of a torch file the table `key`): {"ok",
    "files", "tensors", "problems"}."""
    return verify_step(VerifyStep(model=str(model), source=None if source is None else str(source), key=key))


def inspect(model: str | Path, **options: Any) -> dict[str, Any]:
    """What a checkpoint holds, from its headers. Options: fields of InspectStep."""
    return inspect_step(resolve(InspectStep, {"model": str(model), **options}))


def push(folder: str | Path, repo: str, **options: Any) -> dict[str, Any]:
    """Upload `folder`, which lpsparse wrote, to the hub: {"url", "commit", "files", "bytes", ...}.
    Options: fields of PushStep."""
    return push_step(resolve(PushStep, {"folder": folder, "repo": repo, **options}))


def evaluate(model: str | Path, **options: Any) -> dict[str, Any]:
    """Loss and accuracy of `model` on data. Options: fields of EvalStep."""
    return evaluate_step(resolve(EvalStep, {"model": str(model), **options}))


def open(path: str | Path, weights: str | None = None, key: str | None = None) -> Checkpoint:
    """A checkpoint of any kind, lazily: `.tensors`, or one as `found[name]`, each with name, dtype, shape,
    `.read()` and `.read_rows(first, last)`, which give raw bits as numpy arrays of unsigned integers.
    `weights` names the file or index in a folder of several, `key` the table in a torch file of several."""
    return open_checkpoint(path, weights, key)


def load(
    path: str | Path, weights: str | None = None, key: str | None = None, *, check: bool = True
) -> dict[str, Any]:
    """Every tensor of a checkpoint of any layout as a dense torch tensor, by name. A tied one is there under
    the names, too, that safetensors' save_model would have left out.

    Raises InputError where lpsparse wrote the folder and a weight file has not the hash that it then had;
    `check=False` trusts the bytes, as `open` does.
    """
    from lpsparse.training.model import LOADED_DTYPES, to_tensors

    checkpoint = open_checkpoint(path, weights, key)
    if check:
        check_weights(checkpoint)
    found = to_tensors(checkpoint.tensors, dtypes=LOADED_DTYPES)
    told = (item for metadata in checkpoint.metadata.values() for item in metadata.items())
    ties = {name: of for name, of in told if name != "format" and not name.startswith("lpsparse.")}
    return {name: found[of] for name, of in ties.items() if of in found} | found


@on_threads
def prune_step(step: PruneStep, say: Say = silent) -> Report | dict[str, Any]:
    """With dry_run of a hub id that would have to be downloaded: what its headers tell, as plain data."""
    if step.dry_run and on_rank_0(lambda: is_remote(step.model)):
        return on_rank_0(lambda: foretell_unread(step, say))
    source, found = _prune(step, say)
    if not step.dry_run:
        check_left(source, found, step.out, say, allow_empty=step.allow_empty)
    return found


@on_threads
def prune_components(step: PruneStep, say: Say = silent) -> dict[str, Report]:
    """Each component that was asked for, pruned by itself into OUT's folder of its name; the rest of the
    pipeline is copied. With dry_run nothing is written."""
    folder, out = Path(step.model), step.out
    names = on_rank_0(lambda: asked_components(folder, step.component))
    rest = Checkpoint(folder.resolve().name, folder, (), (), {})
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    on_rank_0(lambda: check_output(out, rest, size, overwrite=False))
    for name in names:  # before the first is written
        refuse_quantised(opened(str(folder / name), silent))
    pruned: dict[str, tuple[Checkpoint, Report]] = {}

    def prune_each(into: Callable[[str], Path]) -> None:
        for name in names:
            say(f"component {name}")
            one = step.model_copy(update={"model": str(folder / name), "out": into(name), "component": ()})
            source, found = _prune(one, say)
            pruned[name] = source, called_after(found, out / name)

    if step.dry_run:
        prune_each(lambda _: out)
        left = find_sidecars(rest, names)[1]
    else:
        with shared_folder(out, overwrite=False) as partial:
            prune_each(partial.__truediv__)
            left = on_rank_0(lambda: copy_sidecars(rest, partial, names))
    if left:
        say(f"{'would be ' if step.dry_run else ''}left behind: {', '.join(left)}")
    for name, (source, found) in pruned.items() if not step.dry_run else ():
        check_left(source, found, out / name, say, allow_empty=step.allow_empty)
    return {name: found for name, (_, found) in pruned.items()}


def _prune(step: PruneStep, say: Say) -> tuple[Checkpoint, Report]:
    began = perf_counter()
    source = opened(step.model, say, step.weights, step.key)
    refuse_quantised(source)
    stamps = stamps_of(source)
    on_rank_0(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    plan = plan_prune(
        source, sparsity=step.sparsity, below=step.below, gap=step.gap, n_m=pair(step.n_m),
        block=pair(step.block), scope=step.scope, include=step.include, exclude=step.exclude,
        look=step.look,
    )  # fmt: skip
    chosen = {name: tensor.decision for name, tensor in plan.tensors.items()}
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
        say_left(source, say)
        decided = perf_counter()
        counts = count_all(source, plan.cut)
        took = (decided - began, perf_counter() - decided)
        found = foretell(step, source, chosen, counts, took, plan.cut)
        if not step.allow_empty and (names := emptied(source, found)):
            say(f"the run would exit 1, as next to nothing is left of {names}; --allow-empty allows it")
        return source, found
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        cut = [tensor for tensor in source.tensors if chosen[tensor.name].prunable]
        written = rewrite(source, folder, plan.cut, step.layout, finite=_finite(chosen))
        _say_nonfinite(written, say)
        counts = written.counts
        alert = drained((tensor.name, counts[tensor.name].zeros, tensor.size) for tensor in cut)
        if alert is not None:
            say(str(alert))
        quality = own_quality(source)
        same = bool(quality) and counts == count_all(source)
        if quality and not same:
            say(
                "quality recorded in MODEL is left out: the cut changed weights; measure again with "
                "`lpsparse eval OUT --against DENSE --save`, DENSE being the model before any cut"
            )
        return source, finish(written, quality if same else ())


def _finite(chosen: Chosen) -> set[str]:
    """The tensors that may hold no NaN or Inf: all but masks, often made of -Inf, and what --exclude
    takes out."""
    return {name for name, each in chosen.items() if each.role != "mask" and each.reason != "--exclude"}


def _say_nonfinite(written: Written, say: Say) -> None:
    for name, counted in written.counts.items():
        if counted.nonfinite:
            say(f"{name!r}: {counted.nonfinite} values are NaN or Inf: carried as they are")


@on_threads
def pack_step(step: PackStep | UnpackStep, say: Say = silent) -> Report:
    source = opened(step.model, say, step.weights, step.key)
    if source.layout in LAYOUTS:
        refuse_quantised(source)
    stamps = stamps_of(source)
    chosen = on_rank_0(lambda: prunable_of(source))
    on_rank_0(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    if step.dry_run:
        say("dry run: nothing is written")
        say_left(source, say)
        began = perf_counter()
        counts = count_all(source)
        return foretell(step, source, chosen, counts, (0, perf_counter() - began))
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        layout, level = (step.layout, step.level) if isinstance(step, PackStep) else ("dense", "default")
        written = rewrite(source, folder, lambda _: None, layout, level=level, finite=())
        _say_nonfinite(written, say)
        return finish(written, own_quality(source))


def push_step(step: PushStep, say: Say = silent, *, bars: bool = False) -> dict[str, Any]:
    """With dry_run: {"files", "bytes", "names", ...}, and nobody is asked. `bars` lets huggingface_hub draw.

    Raises VerdictError where the folder is not what its manifest says.
    """
    from lpsparse.checkpoint.push import Target, check_access, choose_files, push_files

    folder = step.folder
    if folder.is_dir() and not step.dry_run:
        read_manifest(folder)
        check_access()  # both at once, the hashes take their time
    found = verify_step(VerifyStep(model=str(folder), source=None, key=None, threads=step.threads), say)
    if not found["ok"]:
        what = f"{folder}: is not what {MANIFEST} says: {found['problems'][0]}"
        raise VerdictError(102, what, hint="write it again; nothing was sent")
    files, stay = choose_files(folder)
    size = sum(record.size for record in files)
    if stay:
        say(f"not sent: {', '.join(stay)}")
    say(f"{len(files)} files, {text.size(size)}, to {step.repo}")
    if step.dry_run:
        names = [{"name": record.name, "bytes": record.size} for record in files]
        return {"repo": step.repo, "files": len(files), "bytes": size, "names": names, "not_sent": stay}
    to = Target(
        step.repo, step.revision, step.private, step.message, step.create_pr, step.delete_others
    )  # fmt: skip
    return push_files(folder, files, to, say, bars=bars)
