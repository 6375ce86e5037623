"""Measure a model on data, and record the figure beside it."""

from typing import TYPE_CHECKING, Any

from lpsparse.checkpoint.manifest import Quality, own_manifest
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.preflight import check_keeps
from lpsparse.commands.artefact import Say, keep_quality
from lpsparse.commands.base import opened, silent
from lpsparse.errors import InputError, UsageError
from lpsparse.parallel.environment import is_rank_0
from lpsparse.reporting.check import check_weights
from lpsparse.steps.finetune import EvalStep
from lpsparse.steps.resolve import as_trained

if TYPE_CHECKING:  # torch comes with it
    from lpsparse.training.quality import Measured
    from lpsparse.training.tasks.base import Task


def evaluate_step(step: EvalStep, say: Say = silent) -> dict[str, Any]:
    """{"model", "task", "split", "trained_on", "loss", "loss_error", ...}: errors are standard errors of the
    mean. With `against` the same of that model as "before_loss" and so on; with `save` the figure is recorded
    in MODEL, whose path is "saved" then."""
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
    found: dict[str, Any] = {"model": source.name, "task": step.task, "split": split, "trained_on": known}
    found |= {**_figures(after), unit: after.count, **({"pixels": task.view} if task.view else {})}
    before = dense = None
    cut = False
    if step.against is not None:
        dense = opened(step.against, say, key=step.key, strict=not source.is_torch)
        cut = _is_cut(dense)
        if cut:
            say(f"{dense.name} was cut already: what that cost is not in this figure, and no budget takes it")
        alike = "give models with the same tokenizer and lengths"
        try:
            before = _measured(step, dense, say)[1]
        except UsageError as error:  # what was asked for is right for MODEL
            raise InputError(358, error.what, hint=alike) from None
        found |= {"against": dense.name, **{f"before_{key}": each for key, each in _figures(before).items()}}
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
    return found | {"saved": None if step.dry_run else str(place)}


def _is_cut(checkpoint: Checkpoint) -> bool:
    """Whether a step of lpsparse has cut it, as its manifest tells."""
    manifest = own_manifest(checkpoint)
    steps = [] if manifest is None else [each.recipe for each in (*manifest.earlier, manifest.as_earlier())]
    trained = [each["finetune"] for each in steps if isinstance(each.get("finetune"), dict)]
    return any("prune" in each for each in steps) or any(each.get("method") != "dense" for each in trained)


def _measured(step: EvalStep, source: Checkpoint, say: Say) -> "tuple[Task, Measured]":
    """What was measured on, and how good the model is on it."""
    from lpsparse.training.loop import prepare
    from lpsparse.training.quality import evaluate

    task = prepare(step, source)
    for note in task.notes:
        say(note)
    return task, evaluate(step, task)


def _figures(measured: "Measured") -> dict[str, float]:
    found = {"loss": measured.loss, "loss_error": measured.loss_error}
    if measured.accuracy is not None:
        found |= {"accuracy": measured.accuracy, "accuracy_error": measured.error_of("accuracy")}
    return found


def _known_data(step: EvalStep, source: Checkpoint, say: Say) -> list[str] | None:
    """Names of the files to measure on that the model was trained on, which is said; None where no manifest
    tells what it was trained on."""
    from lpsparse.training.data import trained_on

    manifest = own_manifest(source)
    if manifest is None or not manifest.trained:
        return None
    known = trained_on(step.data, step.split, manifest.trained)
    if known:
        share = next(iter(known.values()))
        aside = "" if share is None else f", but for the {100 * share:g} % that it had set aside"
        say(
            f"{source.name} was trained on {', '.join(known)}{aside}: this says little of other data; give "
            "data that were held out, or --split NAME[from:to] with the part that did not train"
        )
    return list(known)
