"""The verdict: whether budgets are met, what is zero, what it takes, how good it is."""

from dataclasses import dataclass

from markupsafe import Markup

from lpsparse.checkpoint.manifest import Quality
from lpsparse.reporting.budgets import quality_drop
from lpsparse.reporting.html.parts import (
    Cell,
    Table,
    count,
    filled,
    listed,
    named,
    number,
    percent,
    plural,
    size,
)
from lpsparse.reporting.records import Budget, Report

CONFIDENCE = 1.96  # standard errors to either side: 95 %
_SHARES = ("min-sparsity", "max-layer-sparsity", "sparsity of", "min-nm")
_ROOM = 0.01  # of its limit: a budget that is met by less is tight
_SIGNS = {"passed": "✓", "failed": "✕", "warning": "!", "none": "–"}


@dataclass(frozen=True, slots=True)
class Card:
    title: str
    value: Cell
    words: tuple[Cell, ...]


def status(report: Report) -> tuple[str, str]:
    """The class of the verdict, and its words."""
    failed = [each for each in report.budgets if not each.passed]
    errors = sum(each.level == "error" for each in failed)
    if not report.budgets:
        return "none", "No budgets were set"
    if errors:
        return "failed", f"Failed: {count(errors)} of {plural(len(report.budgets), 'budget')}"
    if failed:
        return "warning", f"Passed, with {plural(len(failed), 'warning')}"
    return "passed", f"Passed: {'the budget is' if len(report.budgets) == 1 else 'all budgets are'} met"


def sentence(report: Report) -> str:
    share = report.prunable
    be = "are" if report.estimate is None else "would be"
    text = f"{count(share.zeros)} of {count(share.weights)} prunable weights {be} zero"
    dry = "" if report.estimate is None else " This is a dry run: nothing was written."
    return f"{text} ({percent(share.sparsity)}).{dry}"


def alerts(report: Report) -> tuple[Cell, ...]:
    if not report.nonfinite_tensors:
        return ()
    many = plural(len(report.nonfinite_tensors), "tensor")
    return (filled("NaN or Inf in {}: {}.", many, listed(report.nonfinite_tensors)),)


def cards(report: Report) -> tuple[Card, ...]:
    share, held, base = report.prunable, report.bytes, report.base
    zeros = f"{count(share.zeros)} of {count(share.weights)} prunable weights are zero"
    every = f"{percent(report.all.sparsity)} of all {count(report.all.weights)} weights"
    before = () if base is None else (f"before: {percent(base.prunable.sparsity)}",)
    ratio = "no BASE was given" if base is None else f"{percent(base.bytes_ratio)} of before"
    zero = percent(held.zero_share)
    disk = _arrow(None if base is None else size(base.file_bytes), size(held.file_bytes))
    dense = _arrow(None if base is None else size(base.dense_bytes), size(held.dense_bytes))
    return (
        Card("Sparsity", percent(share.sparsity), (zeros, every, *before)),
        Card("On disk", disk, (f"weight files, in the {report.layout} layout", ratio)),
        Card("Dense equivalent", dense, ("the same tensors, stored densely", f"{zero} are bytes of zeros")),
        *(_quality(each) for each in report.quality),
        *([] if report.quality else [Card("Quality", "–", ("not recorded of these weights",))]),
    )  # fmt: skip


def _arrow(before: str | None, after: str) -> Cell:
    if before is None:
        return after
    return filled('<span class="before">{}</span> <span class="arrow">→</span> {}', before, after)


def _quality(each: Quality) -> Card:
    before = None if each.before is None else number(each.before)
    drop = quality_drop(each)
    if drop is None:
        change = "the model had no head for the task before"
    elif drop == 0:
        change = "unchanged"
    else:
        change = f"{'worse' if drop > 0 else 'better'} by {number(abs(drop))}"
    spread = [interval(error) for error in (each.before_error, each.after_error) if error is not None]
    said = f"{' and '.join(spread)} (95 % intervals)" if spread else "no interval is recorded"
    better = "higher is better" if each.higher_is_better else "lower is better"
    return Card(
        f"Quality: {each.metric}", _arrow(before, number(each.after)),
        (change, said, *_meet(each), f"{count(each.rows)} of {each.split}; {better}"),
    )  # fmt: skip


def _meet(each: Quality) -> tuple[str, ...]:
    if each.before is None or each.before_error is None or each.after_error is None:
        return ()
    apart = abs(each.before - each.after) > CONFIDENCE * (each.before_error + each.after_error)
    return ("the intervals are apart" if apart else "the intervals overlap",)


def interval(error: float | None) -> str:
    return "–" if error is None else f"±{number(CONFIDENCE * error, 2)}"


def budgets(report: Report) -> Table:
    """Failed first, as the report has them."""
    body = [
        (
            mark(_level(each)), _name(each), _figure(each, each.value), _figure(each, each.limit),
            _margin(each), each.level, _remark(each),
        )
        for each in report.budgets
    ]  # fmt: skip
    head = ("verdict", "budget", "value", "limit", "margin", "level", "remark")
    return Table("Budgets, failed first", head, body, words=(0, 1, 5, 6))


def mark(name: str) -> Markup:
    """A word and a sign: colour alone says nothing."""
    sign = '<span class="mark {}"><span aria-hidden="true">{}</span> {}</span>'
    return filled(sign, name, _SIGNS[name], name)


def _level(budget: Budget) -> str:
    return "passed" if budget.passed else "failed" if budget.level == "error" else "warning"


def _name(budget: Budget) -> Cell:
    if budget.pattern is None:
        return budget.name
    return filled("{} for {}", budget.name, named(budget.pattern))


def _figure(budget: Budget, value: float | None) -> str:
    if value is None:
        return "not recorded"
    if "bytes" in budget.name:
        return f"{count(value)} B"
    return percent(value) if budget.name.startswith(_SHARES) else number(value)


def _margin(budget: Budget) -> str:
    if budget.margin is None:
        return "–"
    distance = _distance(budget, abs(budget.margin))
    if not any(digit in distance for digit in "123456789"):
        return distance  # met, but for what rounding to whole weights takes
    return f"{'+' if budget.margin > 0 else '−'}{distance}"


def _distance(budget: Budget, margin: float) -> str:
    if "bytes" in budget.name:
        return size(margin)
    return f"{100 * margin:.2f} points" if budget.name.startswith(_SHARES) else number(margin)


def _remark(budget: Budget) -> Cell:
    if budget.value is None:
        return "what was not recorded fails its budget"
    if budget.worst is not None:
        return filled("decided by {}", named(budget.worst))
    if not budget.passed or budget.margin is None or budget.margin <= _ROOM * abs(budget.limit):
        return ""
    beaten = _distance(budget, budget.margin)
    if budget.name.endswith("of baseline"):
        return f"better than the baseline allows by {beaten}: take this report as the new one?"
    return f"you beat this budget by {beaten}: tighten it?"
