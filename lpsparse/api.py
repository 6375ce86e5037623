"""The public functions: one for each command, ten lines each.

Torch is imported where training begins, nowhere else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

from lpsparse.checkpoint.open import Checkpoint, open_checkpoint
from lpsparse.commands.evaluate import evaluate_step
from lpsparse.commands.finetune import finetune_step
from lpsparse.commands.inspect import inspect_step
from lpsparse.commands.pack import pack_step
from lpsparse.commands.prune import prune_components, prune_step
from lpsparse.commands.push import push_step
from lpsparse.commands.report import write_report
from lpsparse.commands.verify import verify_step
from lpsparse.reporting.check import check_weights
from lpsparse.reporting.records import Report
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.push import PushStep
from lpsparse.steps.report import InspectStep, ReportStep, VerifyStep
from lpsparse.steps.resolve import resolve


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
    model: str | Path,
    base: str | Path | None = None,
    *,
    json: str | Path | None = None,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    comment: str | Path | None = None,
    junit: str | Path | None = None,
    csv: str | Path | None = None,
    **options: Any,
) -> Report:
    """Measure `model`, and what it came from; `json` to `csv` are files to write views of it to.
    Options: fields of ReportStep."""
    views = {"json": json, "html": html, "markdown": markdown, "comment": comment, "junit": junit, "csv": csv}
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
