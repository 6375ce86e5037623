"""Budgets: limits that a report meets or fails, each with its value and its margin; failed first."""

from decimal import Decimal
from fnmatch import fnmatchcase
from math import floor
from typing import Literal

from lpsparse.checkpoint.manifest import Quality
from lpsparse.errors import InputError, UsageError
from lpsparse.reporting.records import Budget, Report, TensorRow, groups
from lpsparse.steps.budgets import BUDGETS, Limit, limit_of
from lpsparse.steps.report import ReportStep

Level = Literal["error", "warn"]
FINITE = "finite"  # the name of what is checked wherever there is a budget


def check_budgets(report: Report, step: ReportStep) -> Report:
    """`report` with a verdict for each budget of `step`. What was not measured fails its budget.

    Raises UsageError for a pattern that matches no tensor.
    """
    found: list[Budget] = []
    for name in BUDGETS:
        level: Level = "warn" if name in step.warn else "error"
        for text in getattr(step, name.replace("-", "_")):
            found.append(_CHECKS[name](report, limit_of(name, text)).model_copy(update={"level": level}))
    if (found or report.budgets) and report.nonfinite_tensors:
        found.append(_finite(report, "warn" if "finite" in step.warn else "error"))
    return _with(report, found)


def _finite(report: Report, level: Level) -> Budget:
    """Nobody asks for it, and nobody who has budgets would pass a model of NaN."""
    count = sum(row.nonfinite for row in report.tensors)
    worst = report.nonfinite_tensors[0]
    return Budget(name=FINITE, limit=0, value=count, margin=-count, level=level, passed=False, worst=worst)


def _with(report: Report, more: list[Budget]) -> Report:
    ordered = sorted((*report.budgets, *more), key=lambda each: (each.passed, each.level == "warn"))
    return report.model_copy(update={"budgets": tuple(ordered)})


def _matching(report: Report, limit: Limit) -> list[TensorRow]:
    """The tensors that a budget is of; without a pattern the prunable ones."""
    if limit.pattern is None:
        return [row for row in report.tensors if row.prunable]
    found = [row for row in report.tensors if fnmatchcase(row.name, limit.pattern)]
    if not found:
        what = f"budget {limit.pattern}={limit.value}: the pattern matches no tensor"
        raise UsageError(290, what, hint="`lpsparse inspect MODEL` lists the names")
    return found


def _min_sparsity(report: Report, limit: Limit) -> Budget:
    rows = _matching(report, limit)
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    if not weights:
        return _at_least("min-sparsity", limit, None, passed=False)
    enough = zeros >= floor(limit.value * weights)  # as many as `prune --sparsity` would leave
    passed = enough and (zeros > 0 or limit.value == 0)
    return _at_least("min-sparsity", limit, zeros / weights, passed=passed)


def _max_bytes(report: Report, limit: Limit) -> Budget:
    size = report.bytes.file_bytes
    if limit.pattern is not None:
        size = sum(row.stored_bytes for row in _matching(report, limit))
    return _at_most("max-bytes", limit, size)


def _max_quality_drop(report: Report, limit: Limit) -> Budget:
    known = [each for each in report.quality if not each.of_cut]
    drops = [drop for each in known if (drop := _drop(each, limit.relative)) is not None]
    found = _at_most("max-quality-drop", limit, max(drops, default=None))
    return found.model_copy(update={"relative": limit.relative})


def _drop(quality: Quality, relative: bool) -> Decimal | None:
    """In decimals, as figures are written: 0.90 to 0.89 is 0.01, which binary fractions have not."""
    if quality.before is None or (relative and not quality.before):
        return None
    before, after = Decimal(repr(quality.before)), Decimal(repr(quality.after))
    drop = before - after if quality.higher_is_better else after - before
    return drop / abs(before) if relative else drop


def _max_layer_sparsity(report: Report, limit: Limit) -> Budget:
    rows = [row for row in _matching(report, limit) if row.weights]
    worst = max(rows, key=lambda row: row.sparsity, default=None)
    found = _at_most("max-layer-sparsity", limit, worst.sparsity if worst else None)
    return found.model_copy(update={"worst": worst.name if worst else None})


def _min_nm(report: Report, limit: Limit) -> Budget:
    assert limit.n_m is not None
    met = whole = 0
    worst: tuple[float, str] | None = None
    for row in _matching(report, limit):
        if row.detail is None:  # a report of zeros alone
            return _at_least(f"min-nm {limit.n_m}", limit, None, passed=False)
        part, count = groups(row, limit.n_m)
        met, whole = met + part, whole + count
        if count and (worst is None or part / count < worst[0]):
            worst = part / count, row.name
    passed = whole > 0 and met >= limit.value * whole
    found = _at_least(f"min-nm {limit.n_m}", limit, met / whole if whole else None, passed=passed)
    return found.model_copy(update={"worst": worst[1] if worst else None})


_CHECKS = {
    "min-sparsity": _min_sparsity,
    "max-bytes": _max_bytes,
    "max-quality-drop": _max_quality_drop,
    "max-layer-sparsity": _max_layer_sparsity,
    "min-nm": _min_nm,
}


def _at_least(name: str, limit: Limit, value: float | None, *, passed: bool) -> Budget:
    least = float(limit.value)
    margin = None if value is None else value - least
    if margin is not None and passed:
        margin = max(margin, 0.0)  # met by whole weights, where the fraction lies between two
    return Budget(name=name, pattern=limit.pattern, limit=least, value=value, margin=margin, passed=passed)


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


def quality_drop(quality: Quality) -> float | None:
    """How much worse `after` is than `before`, in the metric's unit; negative when better."""
    drop = _drop(quality, relative=False)
    return None if drop is None else float(drop)


def check_baseline(report: Report, baseline: Report, step: ReportStep) -> Report:
    """`report` with budgets that say it is no worse than `baseline` by more than `step` allows.

    Raises InputError where the two cannot be compared.
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
    """A quality that is recorded there and not here fails."""
    name, after = f"{theirs.metric} of baseline", Decimal(repr(theirs.after))
    may = abs(after) * (-regression if theirs.higher_is_better else regression)
    if not theirs.higher_is_better:
        return _at_most(name, Limit(after + may), None if mine is None else mine.after)
    value = None if mine is None else mine.after
    passed = value is not None and Decimal(repr(value)) >= after + may
    return _at_least(name, Limit(after + may), value, passed=passed)


def _check_alike(report: Report, baseline: Report, name: str) -> tuple[str, ...]:
    """Raises InputError where the two cannot be compared. What is not known of it, in words."""
    ours, theirs = report.identity, baseline.identity
    why = None
    if ours is None or theirs is None:
        why = "it does not say what it was measured of"
    elif None not in (ours.base_sha256, theirs.base_sha256) and ours.base_sha256 != theirs.base_sha256:
        why = f"its chain began with other weights (sha256 {str(theirs.base_sha256)[:12]}, "
        why += f"here {str(ours.base_sha256)[:12]})"
    elif ours.prunable_sha256 != theirs.prunable_sha256:
        why = (
            f"it counted other tensors as prunable ({baseline.prunable.weights:,} weights, here "
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
        raise InputError(354, what, hint="make the baseline again, from the same base model and data")
    if ours is not None and theirs is not None and None in (ours.base_sha256, theirs.base_sha256):
        return (
            "whether the baseline is of the same base model: one of the two reports does not know its own",
        )
    return ()
