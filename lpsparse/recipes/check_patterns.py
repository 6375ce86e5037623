"""Patterns of a step against the names in a checkpoint, before the step runs."""

from fnmatch import fnmatchcase

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.families import BUDGETS
from lpsparse.pruning.plan import plan_unread
from lpsparse.pruning.targets import Chosen, choose, no_match
from lpsparse.reporting.budgets.base import no_tensor
from lpsparse.reporting.measure import prunable_of
from lpsparse.steps.base import Step
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.report import ReportStep

_HEADED = ("text-classification", "image-classification")  # tasks that give a model a head where it has none
_NOT_YET = "matches no tensor yet; the new head may give it one"


def check_patterns(
    step: Step, source: Checkpoint, known: Chosen | None, *, renamed: bool
) -> tuple[Chosen | None, list[str], bool]:
    """Which tensors are prunable, and why (None where the step chooses none); what could not be checked; and
    whether the names of the result may differ from those of `source`. `known` is what the manifest of
    `source` will say, where a step before writes it: a report without patterns takes that.

    With `renamed` a pattern that matches nothing is told, else it raises UsageError with the nearest name.
    """
    if not isinstance(step, (FinetuneStep, PruneStep, ReportStep)):
        return None, [], renamed
    names = [tensor.name for tensor in source.tensors]
    if isinstance(step, FinetuneStep) and step.task in _HEADED and step.model_fn is None:
        plain = choose(source, needed=False)
        heads = [name for name, each in plain.items() if each.role == "head" and "pooler" not in name]
        renamed = renamed or not heads
    notes = _check_budgets(step, names, renamed=renamed) if isinstance(step, ReportStep) else []
    freeze = step.freeze if isinstance(step, FinetuneStep) else ()
    if renamed:
        given = (*step.include, *step.exclude, *freeze)
        unknown = [each for each in given if not any(fnmatchcase(name, each) for name in names)]
        notes += [f"{each}: {_NOT_YET}" for each in unknown]
        there = {
            key: tuple(each for each in getattr(step, key) if each not in unknown)
            for key in ("include", "exclude")
        }
        freeze = tuple(each for each in freeze if each not in unknown)
        step = step.model_copy(update=there)
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise no_match("--freeze", pattern, names)
    if isinstance(step, PruneStep):
        chosen = choose(source, step.include, step.exclude, always_look=step.look)
        plan_unread(source, step, chosen)
    elif isinstance(step, FinetuneStep):
        chosen = choose(source, step.include, step.exclude)
    elif known is not None and not step.include and not step.exclude:
        chosen = known
    else:
        chosen = prunable_of(source, step.include, step.exclude)
    return chosen, notes, renamed


def _check_budgets(step: ReportStep, names: list[str], *, renamed: bool) -> list[str]:
    """Budgets of tensors that are not there yet; those of tensors that cannot be there raise UsageError."""
    notes: list[str] = []
    for name, kind in BUDGETS.items():
        for text in getattr(step, kind.field, ()):
            pattern = kind.limit(text).pattern
            if pattern is None or any(fnmatchcase(each, pattern) for each in names):
                continue
            if not renamed:
                raise no_tensor(f"--{name} {text}")
            notes.append(f"{pattern}: {_NOT_YET}")
    return notes
