"""Measure a model on data, and record the figure beside it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from lpsparse.checkpoint.manifest import Quality, own_manifest
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.preflight import check_keeps
from lpsparse.commands.artefact import Say, keep_quality
from lpsparse.commands.base import opened, silent
from lpsparse.commands.checks import Checked, Held, check_files, check_model
from lpsparse.commands.results import Evaluation, Figure
from lpsparse.errors import InputError, UsageError
from lpsparse.parallel.environment import is_rank_0
from lpsparse.reporting.check import check_weights
from lpsparse.steps.finetune import EvalStep
from lpsparse.steps.resolve import as_trained
from lpsparse.training import memory

if TYPE_CHECKING:  # torch comes with it
    from lpsparse.training.quality import Measured
    from lpsparse.training.tasks.base import Task


def evaluate_step(step: EvalStep, say: Say = silent) -> Evaluation:
    """The quality of MODEL, and of `against`; with `save` it is recorded in MODEL."""
    strict = step.against is None  # else --key may be meant for that, and goes to both
    source = opened(step.model, say, step.weights, step.key, strict=strict)
    manifest = own_manifest(source)
    step = as_trained(step, {} if manifest is None else manifest.training)
    place = check_keeps(source) if step.save else None
    if place is not None:
        check_weights(source)
    say(f"loading {step.model}")  # torch too, which takes seconds
    from lpsparse.training.data import find
    from lpsparse.training.quality import held_of

    task, after = _measured(step, source, say)
    unit = task.unit
    known = _known_data(step, source, say)
    split = find(step.data, step.split)[2]
    found = Evaluation(
        source.name, step.task, split, known, _figure(after), after.count, unit, task.view or None
    )
    before = dense = None
    cut = False
    if step.against is not None:
        dense = opened(step.against, say, key=step.key, strict=not source.is_torch)
        cut = _is_cut(dense)
        if cut:
            say(f"{dense.name} was cut already: this figure leaves out what that cost, so no budget uses it")
        alike = "give models with the same tokenizer and lengths"
        try:
            before = _measured(step, dense, say)[1]
        except UsageError as error:  # what was asked for is right for MODEL
            raise InputError(358, error.what, hint=alike) from None
        found = replace(found, against=dense.name, before=_figure(before))
        if before.count != after.count:
            what = f"{dense.name}: {before.count} {unit} were measured, of {source.name} {after.count}"
            raise InputError(358, what, hint=alike)
    if place is None:
        return found
    metric, held = "loss" if after.accuracy is None else "accuracy", held_of(step, task)
    quality = Quality(
        metric=metric,
        before=None if before is None else before.of(metric),
        after=after.of(metric),
        higher_is_better=metric == "accuracy",
        rows=after.count,
        split=f"{split} {unit}",
        before_error=None if before is None else before.error_of(metric),
        after_error=after.error_of(metric),
        data_sha256=held.sha256,
        task=step.task,
        data=held.names,
        before_of=None if dense is None else dense.name,
        of_cut=cut,
    )
    if step.dry_run:
        say("dry run: nothing is written")
    elif is_rank_0():
        keep_quality(place, quality)
    return replace(found, saves=True, saved=None if step.dry_run else str(place))


def check(step: EvalStep, held: Held) -> Checked:
    """What is known of the step before it runs. Raises what it would raise for its settings and files."""
    source = held.checkpoint
    manifest = None if held.made else own_manifest(source)  # of a model made before, the recipe has said all
    if step.save and not held.made:
        check_keeps(source)
    step = as_trained(step, {} if manifest is None else manifest.training)
    check_model(step, source)
    notes = check_files(step.task, {step.data: [step.split]})
    memory_bytes = memory.of_measuring(sum(tensor.size for tensor in source.tensors))
    return Checked(None, notes, held.renamed, memory_bytes)


def _is_cut(checkpoint: Checkpoint) -> bool:
    """Whether a step of lpsparse has cut it, as its manifest tells."""
    manifest = own_manifest(checkpoint)
    steps = [] if manifest is None else [each.recipe for each in (*manifest.earlier, manifest.as_earlier())]
    trained = [each["finetune"] for each in steps if isinstance(each.get("finetune"), dict)]
    return any("prune" in each for each in steps) or any(each.get("method") != "dense" for each in trained)


def _measured(step: EvalStep, source: Checkpoint, say: Say) -> "tuple[Task, Measured]":
    """What was measured on, and how good the model is on it."""
    from lpsparse.training.build import prepare
    from lpsparse.training.quality import evaluate

    task = prepare(step, source)
    for note in task.notes:
        say(note)
    return task, evaluate(step, task)


def _figure(measured: "Measured") -> Figure:
    if measured.accuracy is None:
        return Figure(measured.loss, measured.loss_error)
    return Figure(measured.loss, measured.loss_error, measured.accuracy, measured.error_of("accuracy"))


def _known_data(step: EvalStep, source: Checkpoint, say: Say) -> tuple[str, ...] | None:
    """Names of the files to measure on that the model was trained on, which is said; None where no manifest
    tells what it was trained on."""
    from lpsparse.training.data import trained_on

    manifest = own_manifest(source)
    if manifest is None or not manifest.trained:
        return None
    known = trained_on(step.data, step.split, manifest.trained)
    if known:
        share = next(iter(known.values()))
        aside = "" if share is None else f", except the {100 * share:g} % that were held out"
        say(
            f"{source.name} was trained on {', '.join(known)}{aside}: this says little about other data. "
            "Give held-out data, or --split NAME[from:to] with rows that were not used for training"
        )
    return tuple(known)
