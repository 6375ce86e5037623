"""The public functions: one for each command, ten lines each.

Torch is imported where training begins, nowhere else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from lpsparse.checkpoint.open import Checkpoint, open_checkpoint
from lpsparse.commands.evaluate import evaluate_step
from lpsparse.commands.finetune import finetune_step
from lpsparse.commands.finetune import preview as preview_finetune
from lpsparse.commands.inspect import inspect_step
from lpsparse.commands.pack import pack_step
from lpsparse.commands.pack import preview as preview_pack
from lpsparse.commands.prune import preview as preview_prune
from lpsparse.commands.prune import preview_components, prune_components, prune_step
from lpsparse.commands.push import preview as preview_push
from lpsparse.commands.push import push_step
from lpsparse.commands.report import write_report
from lpsparse.commands.results import (
    Evaluation,
    Listing,
    RemotePreview,
    TrainingPreview,
    Upload,
    UploadPreview,
    Verification,
)
from lpsparse.commands.verify import verify_step
from lpsparse.families import VIEWS
from lpsparse.reporting.check import check_weights
from lpsparse.reporting.records import Report
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.options import (
    EvalOptions,
    FinetuneOptions,
    InspectOptions,
    PackOptions,
    PruneOptions,
    PushOptions,
    ReportOptions,
    UnpackOptions,
)
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.push import PushStep
from lpsparse.steps.report import InspectStep, ReportStep, VerifyStep
from lpsparse.steps.resolve import resolve

Model = str | Path


@overload
def prune(
    model: Model,
    out: Model,
    *,
    component: str | Sequence[str],
    dry_run: bool | None = None,
    **options: Unpack[PruneOptions],
) -> dict[str, Report]: ...


@overload
def prune(
    model: Model, out: Model, *, dry_run: Literal[True], **options: Unpack[PruneOptions]
) -> Report | RemotePreview: ...


@overload
def prune(
    model: Model, out: Model, *, dry_run: Literal[False] | None = None, **options: Unpack[PruneOptions]
) -> Report: ...


def prune(
    model: Model,
    out: Model,
    *,
    component: str | Sequence[str] | None = None,
    dry_run: bool | None = None,
    **options: Unpack[PruneOptions],
) -> Report | RemotePreview | dict[str, Report]:
    """Cut the smallest weights of `model` to exact zeros and write `out`.

    With `component` each of these components of a diffusers pipeline is cut by itself, the rest is copied,
    and there is a report for each name. With `dry_run` nothing is written: the report is what `out` would be,
    of a hub id that is not in the cache what its headers tell.
    """
    step = resolve(PruneStep, _given(model, out, component=component, dry_run=dry_run, **options))
    if step.component:
        return preview_components(step) if step.dry_run else prune_components(step)
    return preview_prune(step) if step.dry_run else prune_step(step)


def pack(model: Model, out: Model, *, dry_run: bool | None = None, **options: Unpack[PackOptions]) -> Report:
    """Store `model` losslessly in a packed layout."""
    step = resolve(PackStep, _given(model, out, dry_run=dry_run, **options))
    return preview_pack(step) if step.dry_run else pack_step(step)


def unpack(
    model: Model, out: Model, *, dry_run: bool | None = None, **options: Unpack[UnpackOptions]
) -> Report:
    """Store `model` densely again, bit for bit."""
    step = resolve(UnpackStep, _given(model, out, dry_run=dry_run, **options))
    return preview_pack(step) if step.dry_run else pack_step(step)


@overload
def finetune(
    model: Model, out: Model, *, dry_run: Literal[True], **options: Unpack[FinetuneOptions]
) -> TrainingPreview: ...


@overload
def finetune(
    model: Model, out: Model, *, dry_run: Literal[False] | None = None, **options: Unpack[FinetuneOptions]
) -> Report: ...


def finetune(
    model: Model, out: Model, *, dry_run: bool | None = None, **options: Unpack[FinetuneOptions]
) -> Report | TrainingPreview:
    """Train `model` so that weights go to zero, and write `out`; with `dry_run` say what would be done."""
    step = resolve(FinetuneStep, _given(model, out, dry_run=dry_run, **options))
    return preview_finetune(step) if step.dry_run else finetune_step(step)


def report(model: Model, base: Model | None = None, **options: Unpack[ReportOptions]) -> Report:
    """Measure `model`, and compare it with `base`. `json`, `html` and the other names of VIEWS are files to
    write the report to."""
    settings: dict[str, Any] = {**options}
    files = {view: Path(settings.pop(view)) for view in VIEWS if settings.get(view) is not None}
    settings = {name: value for name, value in settings.items() if name not in VIEWS}
    given = {"model": str(model), "base": None if base is None else str(base), **settings}
    return write_report(resolve(ReportStep, given), files)


def verify(model: Model, source: Model | None = None, *, key: str | None = None) -> Verification:
    """Check a folder against its manifest, and what it was cut from (in a torch file its table `key`)."""
    return verify_step(VerifyStep(model=str(model), source=None if source is None else str(source), key=key))


def inspect(model: Model, **options: Unpack[InspectOptions]) -> Listing:
    """What a checkpoint holds, from its headers."""
    return inspect_step(resolve(InspectStep, {"model": str(model), **options}))


@overload
def push(
    folder: Model, repo: str, *, dry_run: Literal[True], **options: Unpack[PushOptions]
) -> UploadPreview: ...


@overload
def push(
    folder: Model, repo: str, *, dry_run: Literal[False] | None = None, **options: Unpack[PushOptions]
) -> Upload: ...


def push(
    folder: Model, repo: str, *, dry_run: bool | None = None, **options: Unpack[PushOptions]
) -> Upload | UploadPreview:
    """Upload `folder`, which lpsparse wrote, to the hub; with `dry_run` say what would be sent."""
    step = resolve(PushStep, _known(folder=folder, repo=repo, dry_run=dry_run, **options))
    return preview_push(step) if step.dry_run else push_step(step)


def evaluate(model: Model, *, dry_run: bool | None = None, **options: Unpack[EvalOptions]) -> Evaluation:
    """Loss and accuracy of `model` on data."""
    return evaluate_step(resolve(EvalStep, _known(model=str(model), dry_run=dry_run, **options)))


def _given(model: Model, out: Model, **options: Any) -> dict[str, Any]:
    return _known(model=str(model), out=out, **options)


def _known(*, dry_run: bool | None, component: object = None, **options: Any) -> dict[str, Any]:
    """What was given. A setting that was not is left to LPSPARSE_NAME, such as LPSPARSE_DRY_RUN=1."""
    own = {"dry_run": dry_run, "component": component}
    return options | {name: value for name, value in own.items() if value is not None}


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
