"""Check a report against its budgets and an earlier report; failed budgets come first."""

from decimal import Decimal
from typing import Literal

from lpsparse.checkpoint.manifest import Quality
from lpsparse.errors import InputError
from lpsparse.families import BUDGETS
from lpsparse.reporting.budgets.base import BudgetKind, Limit
from lpsparse.reporting.records import Budget, Report
from lpsparse.steps.report import ReportStep

Level = Literal["error", "warn"]
FINITE = "finite"  # the name of the check that runs wherever there is a budget


def check_budgets(report: Report, step: ReportStep) -> Report:
    """`report` with a verdict for each budget of `step`. A budget fails if its value was not measured.

    Raises UsageError for a pattern that matches no tensor.
    """
    found: list[Budget] = []
    for name, kind in BUDGETS.items():
        level: Level = "warn" if name in step.warn else "error"
        for text in getattr(step, kind.field, ()):
            checked = _check(report, kind, kind.limit(text))
            found.append(checked.model_copy(update={"level": level}))
    if (found or report.budgets) and report.nonfinite_tensors:
        found.append(_finite(report, "warn" if "finite" in step.warn else "error"))
    return _with(report, found)


def _check(report: Report, kind: BudgetKind, limit: Limit) -> Budget:
    value, worst, passed = kind.measure(report, limit)
    name = kind.name if limit.n_m is None else f"{kind.name} {limit.n_m}"
    if kind.at_least:
        reached = value is not None and value >= limit.value
        found = _at_least(name, limit, value, passed=reached if passed is None else passed)
    else:
        found = _at_most(name, limit, value)
    return found.model_copy(update={"worst": worst, "relative": limit.relative})


def _finite(report: Report, level: Level) -> Budget:
    """Fails without being asked for: nobody who sets budgets wants to pass a model with NaN."""
    count = sum(row.nonfinite for row in report.tensors)
    worst = report.nonfinite_tensors[0]
    return Budget(name=FINITE, limit=0, value=count, margin=-count, level=level, passed=False, worst=worst)


def _with(report: Report, more: list[Budget]) -> Report:
    ordered = sorted((*report.budgets, *more), key=lambda each: (each.passed, each.level == "warn"))
    return report.model_copy(update={"budgets": tuple(ordered)})


def _at_least(name: str, limit: Limit, value: Decimal | float | None, *, passed: bool) -> Budget:
    least = float(limit.value)
    margin = None if value is None else float(value) - least
    if margin is not None and passed:
        margin = max(margin, 0.0)  # the fraction may lie between two counts of weights
    return Budget(
        name=name,
        pattern=limit.pattern,
        limit=least,
        value=None if value is None else float(value),
        margin=margin,
        passed=passed,
    )


def _at_most(name: str, limit: Limit, value: Decimal | float | None) -> Budget:
    exact = None if value is None else value if isinstance(value, Decimal) else Decimal(repr(value))
    return Budget(
        name=name,
        pattern=limit.pattern,
        limit=float(limit.value),
        value=None if exact is None else float(exact),
        margin=None if exact is None else float(limit.value - exact),
        passed=exact is not None and exact <= limit.value,
    )


def check_baseline(report: Report, baseline: Report, step: ReportStep) -> Report:
    """`report` with budgets that fail if it is worse than `baseline` by more than `step` allows.

    Raises InputError if the two cannot be compared.
    """
    name, regression = str(step.baseline), step.max_regression
    unknown = _check_alike(report, baseline, name)
    share = Decimal(1) - regression
    level: Level = "warn" if "baseline" in step.warn else "error"
    zeros = Limit(Decimal(repr(baseline.prunable.sparsity)) * share)
    passed = report.prunable.zeros >= baseline.prunable.zeros * share  # of the same weights
    size = Limit(baseline.bytes.file_bytes * (1 + regression))
    measured = {(each.metric, each.data_sha256): each for each in report.quality}
    shared = {each.metric for each in baseline.quality if (each.metric, each.data_sha256) in measured}
    theirs = [
        each
        for each in baseline.quality
        if each.metric not in shared or (each.metric, each.data_sha256) in measured
    ]
    limits = [
        (
            _at_least("sparsity of baseline", zeros, report.prunable.sparsity, passed=passed),
            baseline.prunable.sparsity,
        ),
        (_at_most("bytes of baseline", size, report.bytes.file_bytes), baseline.bytes.file_bytes),
        *(
            (_no_worse(measured.get((each.metric, each.data_sha256)), each, regression), each.after)
            for each in theirs
        ),
    ]
    found = [each.model_copy(update={"level": level, "baseline": value}) for each, value in limits]
    said = (*report.not_measured, *unknown)
    return _with(report.model_copy(update={"baseline": name, "not_measured": said}), found)


def _no_worse(mine: Quality | None, theirs: Quality, regression: Decimal) -> Budget:
    """Fails if only the baseline has this quality."""
    name, after = f"{theirs.metric} of baseline", Decimal(repr(theirs.after))
    may = abs(after) * (-regression if theirs.higher_is_better else regression)
    if not theirs.higher_is_better:
        return _at_most(name, Limit(after + may), None if mine is None else mine.after)
    value = None if mine is None else mine.after
    passed = value is not None and Decimal(repr(value)) >= after + may
    return _at_least(name, Limit(after + may), value, passed=passed)


def _check_alike(report: Report, baseline: Report, name: str) -> tuple[str, ...]:
    """Sentences about what could not be checked. Raises InputError if the two cannot be compared."""
    ours, theirs = report.identity, baseline.identity
    why = None
    if ours is None or theirs is None:
        why = "it does not record which weights were measured"
    elif None not in (ours.base_sha256, theirs.base_sha256) and ours.base_sha256 != theirs.base_sha256:
        why = f"it has another base model (sha256 {str(theirs.base_sha256)[:12]}, "
        why += f"expected {str(ours.base_sha256)[:12]})"
    elif ours.prunable_sha256 != theirs.prunable_sha256:
        why = (
            f"it counted other tensors as prunable ({baseline.prunable.weights:,} weights, expected "
            f"{report.prunable.weights:,})"
        )
    for metric in sorted({each.metric for each in report.quality}):
        data, known = (
            {each.data_sha256 for each in quality if each.metric == metric}
            for quality in (report.quality, baseline.quality)
        )
        if known and data.isdisjoint(known):
            why = why or f"its {metric} was measured on other data"
    if why is not None:
        what = f"{name}: not comparable with {report.model}: {why}"
        raise InputError(354, what, hint="make the baseline again with the same base model and data")
    if ours is not None and theirs is not None and None in (ours.base_sha256, theirs.base_sha256):
        return (
            "whether the baseline has the same base model: one of the two reports does not record its own",
        )
    return ()
