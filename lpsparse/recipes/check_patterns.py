"""Patterns of a step against the names in a checkpoint, before the step runs."""

from fnmatch import fnmatchcase

from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import UsageError
from lpsparse.pruning.plan import plan_unread
from lpsparse.pruning.targets import Chosen, choose, no_match
from lpsparse.reporting.measure import prunable_of
from lpsparse.steps.base import Step
from lpsparse.steps.budgets import BUDGETS, limit_of
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.prune import PruneStep, pair
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
        plan = plan_unread(
            source,
            sparsity=step.sparsity,
            n_m=pair(step.n_m),
            block=pair(step.block),
            scope=step.scope,
            include=step.include,
            exclude=step.exclude,
            look=step.look,
        )
        chosen = plan.chosen
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
    for name in BUDGETS:
        for text in getattr(step, name.replace("-", "_")):
            pattern = limit_of(name, text).pattern
            if pattern is None or any(fnmatchcase(each, pattern) for each in names):
                continue
            if not renamed:
                what = f"budget --{name} {text}: the pattern matches no tensor"
                raise UsageError(290, what, hint="`lpsparse inspect MODEL` lists the names")
            notes.append(f"{pattern}: {_NOT_YET}")
    return notes
