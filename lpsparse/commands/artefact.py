"""What stands in OUT beside the weights: sidecars, report, card, and the manifest that says what made it."""

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.counting import count
from lpsparse.checkpoint.files import (
    BASE_CARD,
    CARD,
    MANIFEST,
    METRICS,
    REPORT,
    copy_sidecars,
    fsync,
    replace_texts,
    write_text,
)
from lpsparse.checkpoint.layouts.retired import free_config
from lpsparse.checkpoint.loader_entry import tell_loaders
from lpsparse.checkpoint.manifest import (
    Manifest,
    Quality,
    Source,
    Trained,
    as_text,
    digest,
    file_record,
    own_manifest,
    read_manifest,
    source_of,
    write_manifest,
)
from lpsparse.checkpoint.open import Checkpoint, open_checkpoint
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.checkpoint.transaction import shared_folder
from lpsparse.checkpoint.write import Written
from lpsparse.errors import InputError, LpsparseError, VerdictError
from lpsparse.families import RETIRED_LAYOUTS
from lpsparse.parallel.threads import beside, on_rank_0
from lpsparse.pruning.targets import Chosen
from lpsparse.reporting import card, charts
from lpsparse.reporting.history import read_report
from lpsparse.reporting.measure import identity_of, measure, tensor_records
from lpsparse.reporting.records import Report, TensorRow
from lpsparse.reporting.text import percent
from lpsparse.steps.base import Step
from lpsparse.steps.finetune import is_training
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep

_EMPTIED, _FEW = 0.01, 0.05  # shares of a layer type that are left: nothing any more, and too little

Say = Callable[[str], None]
Stamps = dict[Path, tuple[int, int, int] | None]
Finish = Callable[[Written, tuple[Quality, ...]], Report]


@contextmanager
def writing(
    step: PruneStep | PackStep | UnpackStep, source: Checkpoint, stamps: Stamps, chosen: Chosen, say: Say
) -> Generator[tuple[Path, Finish]]:
    """A folder to rewrite into, and the call that completes it. Raises InputError when a file of `source` no
    longer has its stamp."""
    with (
        shared_folder(step.out, overwrite=step.overwrite) as folder,
        beside(lambda: source_of(source)) as record,
    ):

        def finish(written: Written, quality: tuple[Quality, ...]) -> Report:
            if written.kept:
                of = f"{written.kept} of {len(written.files)} weight files"
                say(f"{of} were complete already, from an interrupted run")
            made_of = record()
            found = on_rank_0(lambda: complete(step, source, made_of, folder, chosen, say, written, quality))
            on_rank_0(lambda: _check_unchanged(stamps))
            return called_after(found, step.out)

        try:
            yield folder, finish
        except Exception as error:
            if not isinstance(error, LpsparseError):
                _check_unchanged(stamps)  # whatever it led to, that is what to tell
            raise


def called_after(report: Report, out: Path) -> Report:
    """`report` under OUT's name, as it is shown. The one in OUT has the source's, so that its bytes do not
    depend on what OUT is called."""
    return report.model_copy(update={"model": out.resolve().name})


def stamps_of(source: Checkpoint) -> Stamps:
    """What tells that a weight file was changed or replaced: taken before it is read."""
    return {path: _stamp(path) for path in source.files}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        info = path.stat()
        return info.st_ino, info.st_size, info.st_mtime_ns
    except OSError:
        return None


def _check_unchanged(stamps: Stamps) -> None:
    for path, known in stamps.items():
        if _stamp(path) != known:
            what = f"{path}: was changed while it was read"
            raise InputError(344, what, hint="run again when no other program writes it")


def check_same(record: Source, known: dict[str, str]) -> None:
    """Raises InputError when a file of the source has not the hash that it had when training began."""
    for file in record.files:
        if file.sha256 != known[file.name]:
            what = f"{record.name}: {file.name} was changed during the training"
            raise InputError(
                344,
                what,
                hint="restore the file and run again; it resumes from the last training state, if any",
            )


def complete(
    step: Step,
    source: Checkpoint,
    record: Source,
    folder: Path,
    chosen: Chosen,
    say: Say,
    written: Written,
    quality: tuple[Quality, ...],
    sidecars: Callable[[Path], None] | None = None,
    notes: tuple[str, ...] = (),
) -> Report:
    """Sidecars beside the weights, then report, card and manifest."""
    left = copy_sidecars(source, folder)
    _keep_curves(step, source, folder)
    if sidecars is not None:
        sidecars(folder)
    freed = free_config(folder) if source.layout in RETIRED_LAYOUTS else ()
    checkpoint = open_checkpoint(folder)
    said = (*freed, *tell_loaders(folder, checkpoint))
    said = (*said, f"left behind: {', '.join(left)}") if left else said
    notes = (*source.notes, *notes, *said)
    for note in said:
        say(note)
    found = measure(checkpoint, chosen, name=source.name, quality=quality, counts=written.counts)
    found = found.model_copy(update={"identity": identity_of(found, record.base_sha256)})
    write_text(folder / REPORT, as_text(found))
    recipe, made = recorded(step), own_manifest(source)
    earlier = () if made is None else (*made.earlier, made.as_earlier())
    text = card.render(
        found,
        record,
        quality,
        recipe=recipe,
        earlier=earlier,
        base_card=folder / BASE_CARD,
        figure=_draw(folder, found, ours=made is not None),
        lost=made is not None and bool(made.quality),
    )
    write_text(folder / CARD, text)
    write_manifest(
        folder,
        record,
        recipe,
        tensor_records(found),
        found.layout,
        quality,
        notes,
        written.files,
        trained=_trained_on(recipe.get("finetune"), made),
        earlier=earlier,
    )
    fsync(folder)
    return found


def check_left(
    source: Checkpoint, found: Report, out: Path, say: Say, *, allow_empty: bool, trained: bool = False
) -> None:
    """Raises VerdictError where what was done to `source` left almost nothing of something (`emptied`), and
    says where it left little of a layer type. OUT is complete."""
    names = emptied(source, found, trained=trained)
    if names and not allow_empty:
        what = f"{out}: the cut left almost nothing of {names}; OUT is complete"
        hint = "--exclude it, spread the cut with --scope tensor, or allow it with --allow-empty"
        raise VerdictError(103, what, hint=hint)
    for kind, some in ({} if trained else _low(found)).items():
        if _EMPTIED <= _left(some) < _FEW:
            left = percent(_left(some))
            say(f"only {left} of the layer type {kind} is left; --scope tensor spreads the cut")


def emptied(source: Checkpoint, found: Report, *, trained: bool = False) -> str:
    """In words, the prunable tensors of which nothing is left, and, untrained, the layer types of which under
    1 % is; empty where there are none. What `source` had no more of does not count."""
    groups = [(row.name, [row]) for row in found.tensors if row.prunable and row.zeros == row.weights > 0]
    if not trained:
        groups += [(f"layer type {k}", some) for k, some in _low(found).items() if _left(some) < _EMPTIED]
    before = {tensor.name: tensor for tensor in source.tensors}
    names = [
        name
        for name, some in groups
        if not _was_empty([before.get(row.name) for row in some], _EMPTIED if len(some) > 1 else 0)
    ]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _low(found: Report) -> dict[str, list[TensorRow]]:
    """The layer types that keep less than half of the share that is left of all prunable weights."""
    kinds: dict[str, list[TensorRow]] = {}
    for row in found.tensors:
        if row.prunable and row.weights:
            kinds.setdefault(row.kind, []).append(row)
    least = (1 - found.prunable.sparsity) / 2
    return {kind: some for kind, some in kinds.items() if _left(some) < least}


def _left(rows: list[TensorRow]) -> float:
    """The share of the weights that is not zero."""
    return 1 - sum(row.zeros for row in rows) / sum(row.weights for row in rows)


def _was_empty(tensors: list[Tensor | None], share: float) -> bool:
    """Whether no more than this share was left of them before."""
    known = [tensor for tensor in tensors if tensor is not None]
    left = sum(tensor.size - count(tensor, tensor.blocks()).zeros for tensor in known)
    return bool(known) and left <= share * sum(tensor.size for tensor in known)


def keep_quality(folder: Path, quality: Quality) -> None:
    """Record a figure of the weights in `folder`, which lpsparse wrote: in its manifest, and in report and
    card where these are as written. One of the same metric and data is replaced; a figure before that was
    known stays where there is no new one."""
    manifest = read_manifest(folder)
    for old in manifest.quality:
        if _same_data(old, quality) and quality.before is None:
            kept = ("before", "before_error", "before_of", "of_cut")
            quality = quality.model_copy(update={name: getattr(old, name) for name in kept})
    others = tuple(old for old in manifest.quality if not _same_data(old, quality))
    manifest = manifest.model_copy(update={"quality": (*others, quality)})
    known = {record.name: record for record in manifest.files}
    whole = {
        name
        for name in (REPORT, CARD)
        if (folder / name).is_file() and digest(folder / name, folder) == known.get(name)
    }
    texts: dict[str, str] = {}
    if REPORT in whole:
        found = read_report(folder).model_copy(update={"quality": manifest.quality})
        texts[REPORT] = as_text(found)
        if CARD in whole:
            drawn = f"]({charts.FIGURE})" in (folder / CARD).read_text(encoding="utf-8")
            texts[CARD] = card.render(
                found,
                manifest.source,
                manifest.quality,
                recipe=manifest.recipe,
                earlier=manifest.earlier,
                base_card=folder / BASE_CARD,
                figure=drawn,
            )
    known |= {name: file_record(name, text) for name, text in texts.items()}
    manifest = manifest.model_copy(update={"files": tuple(known.values())})
    replace_texts(folder, {**texts, MANIFEST: as_text(manifest)})


def _same_data(one: Quality, other: Quality) -> bool:
    return (one.metric, one.data_sha256) == (other.metric, other.data_sha256)


def _keep_curves(step: Step, source: Checkpoint, folder: Path) -> None:
    """The curves of the training that led here stay with the weights; who trains has curves of his own."""
    if step.trains or source.root is None or own_manifest(source) is None:
        return
    path = source.root / METRICS
    if path.is_file() and not path.is_symlink():  # which might lead out of the folder
        shutil.copyfile(path, folder / METRICS)
        fsync(folder / METRICS)


def _trained_on(settings: dict[str, Any] | None, earlier: Manifest | None) -> tuple[Trained, ...]:
    """What the steps so far trained on, and what a finetune step of these settings did."""
    before = () if earlier is None else earlier.trained
    if settings is None:
        return before
    other = settings["eval_split"] is not None or "eval_data" in settings
    share = None if other else settings["eval_fraction"]
    own = Trained(data=settings["data"], split=settings["split"], set_aside=share)
    return before if own in before else (*before, own)


def _draw(folder: Path, found: Report, *, ours: bool) -> bool:
    """Draw the card's figure, unless somebody else's files are where it would be."""
    path = folder / charts.FIGURE
    if path.exists() and not ours:
        return False
    path.parent.mkdir(exist_ok=True)
    write_text(path, charts.sparsity_figure(found))
    fsync(path.parent)
    return True


def recorded(step: Step) -> dict[str, Any]:
    """What the manifest says made OUT: the step's settings, and the hashes of the data that it read."""
    settings = step.recorded()
    if is_training(step):
        from lpsparse.training.data import recorded_data

        settings |= recorded_data(step)
    return {step.command: settings}
