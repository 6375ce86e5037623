"""Show the verdict: budgets, zeros, bytes and quality."""

from dataclasses import dataclass

from markupsafe import Markup

from lpsparse.checkpoint.manifest import Quality
from lpsparse.reporting import summary
from lpsparse.reporting.html.parts import (
    Cell,
    Table,
    coded,
    count,
    filled,
    listed,
    named,
    number,
    percent,
    plural,
    size,
    typeset,
)
from lpsparse.reporting.records import Budget, Report
from lpsparse.reporting.summary import apart, budget_row, change_of, hint, nonfinite, spread

_LEVELS = {"ok": "passed", "FAILED": "failed", "warn": "warning"}
_SIGNS = {"passed": "✓", "failed": "✕", "warning": "!", "none": "–"}


@dataclass(frozen=True, slots=True)
class Card:
    title: str
    value: Cell
    words: tuple[Cell, ...]


def status(report: Report) -> tuple[str, str]:
    """The class of the verdict, and its words."""
    failed, warned, of = summary.budget_counts(report)
    alarm = nonfinite(report)
    if failed:
        return "failed", f"Failed: {count(failed)} of {plural(of, 'budget')}"
    if alarm:
        return "failed", f"Not finite: {typeset(alarm)}"
    if not of:
        return "none", "No budgets were set"
    if warned:
        return "warning", f"Passed, with {plural(warned, 'warning')}"
    return "passed", f"Passed: {'the budget is' if of == 1 else 'all budgets are'} met"


def sentence(report: Report) -> str:
    share = report.prunable
    be = "are" if report.estimate is None else "would be"
    text = f"{count(share.zeros)} of {count(share.weights)} prunable weights {be} zero"
    dry = "" if report.estimate is None else " This is a dry run: nothing was written."
    return f"{text} ({percent(share.sparsity)}).{dry}"


def alerts(report: Report) -> tuple[Cell, ...]:
    found: list[Cell] = []
    if report.nonfinite_tensors:
        many = plural(len(report.nonfinite_tensors), "tensor")
        found.append(filled("NaN or Inf in {}: {}.", many, listed(report.nonfinite_tensors)))
    for alert in summary.alerts(report):
        names = (filled("{}{}", named(name), typeset(remark)) for name, remark in alert.tensors)
        what = alert.what[0].upper() + alert.what[1:]
        found.append(filled("{} {}{}.", what, Markup(", ").join(names), coded(alert.hint)))
    return tuple(found)


def cards(report: Report) -> tuple[Card, ...]:
    share, held, base = report.prunable, report.bytes, report.base
    zeros = f"{count(share.zeros)} of {count(share.weights)} prunable weights are zero"
    every = f"{percent(report.all.sparsity)} of all {count(report.all.weights)} weights"
    before = () if base is None else (f"before: {percent(base.prunable.sparsity)}",)
    ratio = "no BASE was given" if base is None else f"{percent(base.bytes_ratio)} of before"
    zero = percent(held.zero_share)
    disk = _arrow(None if base is None else size(base.file_bytes), size(held.file_bytes))
    return (
        Card("Sparsity", percent(share.sparsity), (zeros, every, *before)),
        Card("On disk", disk, (f"weight files, in the {report.layout} layout", ratio)),
        _packed(report, f"{zero} of {size(held.dense_bytes)} stored densely are zeros"),
        *(_quality(each) for each in report.quality),
        *([] if report.quality else [Card("Quality", "–", ("not recorded of these weights",))]),
    )


def _packed(report: Report, zeros: str) -> Card:
    """The size after `pack`, or an estimate."""
    packed, dense = report.bytes.packed_bytes, report.bytes.dense_bytes
    if packed is None:
        return Card("Packed", "–", ("not known: only zeros were counted", zeros))
    change = typeset(f"{100 * (packed / dense - 1):+.0f} %") if dense else "–"
    how = "as it is" if report.layout == "packed" else coded("about what `lpsparse pack` writes")
    return Card("Packed", f"{size(packed)}, {change}", (how, zeros))


def _arrow(before: str | None, after: str) -> Cell:
    if before is None:
        return after
    return filled('<span class="before">{}</span> <span class="arrow">→</span> {}', before, after)


def _quality(each: Quality) -> Card:
    before = None if each.before is None else number(each.before)
    change = typeset(change_of(each)) or "not measured before: without its head, or without --against"
    errors = [error for error in (each.before_error, each.after_error) if error is not None]
    said = f"{' and '.join(map(spread, errors))} (95 % intervals)" if errors else "no interval is recorded"
    better = "higher is better" if each.higher_is_better else "lower is better"
    return Card(
        f"Quality: {each.metric}",
        _arrow(before, number(each.after)),
        (change, said, *_meet(each), f"{count(each.rows)} of {each.split}; {better}"),
    )


def _meet(each: Quality) -> tuple[str, ...]:
    known = apart(each)
    return () if known is None else ("the intervals are apart" if known else "the intervals overlap",)


def budgets(report: Report) -> Table:
    """Failed first, as the report has them."""
    body = [_row(each) for each in report.budgets]
    head = ("verdict", "budget", "value", "limit", "margin", "level", "remark")
    return Table("Budgets, failed first", head, body, words=(0, 1, 5, 6), stacks=True)


def _row(budget: Budget) -> tuple[Cell, ...]:
    _, *figures, said = budget_row(budget)
    limit, value, margin = map(typeset, figures)
    return mark(_LEVELS[said]), _name(budget), value, limit, margin or "–", budget.level, _remark(budget)


def mark(name: str) -> Markup:
    """A word and a sign, for readers who do not see the colour."""
    sign = '<span class="mark {}"><span aria-hidden="true">{}</span> {}</span>'
    return filled(sign, name, _SIGNS[name], name)


def _name(budget: Budget) -> Cell:
    if budget.pattern is None:
        return budget.name
    return filled("{} for {}", budget.name, named(budget.pattern))


def _remark(budget: Budget) -> Cell:
    if budget.value is None:
        return "what was not recorded fails its budget"
    if budget.worst is not None:
        return filled("decided by {}", named(budget.worst))
    return typeset(hint(budget, "this budget") or "")
