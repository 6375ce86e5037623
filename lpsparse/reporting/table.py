"""The report on a terminal: for 80 columns, and whole in a pipe; it says what each figure is of."""

from lpsparse.reporting.records import Estimate, Report
from lpsparse.reporting.text import clean, columns, fitted, percent, size
from lpsparse.reporting.words import (
    alerts,
    apart_in_words,
    budget_row,
    change_of,
    changes,
    cut_at,
    hint,
    in_figures,
    interval,
    largest_change,
    neighbours,
    nonfinite,
    oddities,
    singular,
    stores,
    verdict,
)

MOST_ROWS = 40
_MOST_NAMES = 5
_INDENT = 17  # where the figures of the totals stand
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"
Line = tuple[str, str]


def render(report: Report, width: int = 80, *, color: bool = False) -> str:
    """Verdict first, then totals, budgets, layer types, then the tensors with the most weights."""
    head = _head(report, width, color)
    head += [fitted(clean(f"warning: {alert}"), width) for alert in alerts(report)]
    return _joined([head, *_middle(report, width), _tensors(report, width)])


def summary(report: Report, width: int = 80) -> str:
    """The same without the tensors, and without what the run has said already."""
    return _joined([_head(report, width, False), *_middle(report, width)])


def _joined(parts: list[list[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts)


def _middle(report: Report, width: int) -> list[list[str]]:
    parts = [_totals(report, width)]
    if report.budgets:
        parts.append(_budgets(report, width))
    if len(report.kinds) > 1:
        parts.append(_kinds(report, width))
    return parts


def _head(report: Report, width: int, color: bool) -> list[str]:
    lines = [fitted(f"{clean(report.model)}: {verdict(report)}", width, hang=0)]
    alarm = nonfinite(report)
    if alarm is None:
        return lines
    alarm = f"NOT FINITE: {alarm}"
    return [f"{_RED}{alarm}{_PLAIN}" if color else alarm, *lines]


def _totals(report: Report, width: int) -> list[str]:
    every = report.all
    lines: list[Line] = [
        ("all weights", f"{every.zeros:,} of {every.weights:,} zero ({percent(every.sparsity)})"),
        *stores(report),
        ("opens with", report.opens_with),
        *_base(report),
        *neighbours(report),
        *oddities(report),
        *((name, f"{value} of {tensor}") for name, value, tensor in singular(report)),
    ]
    for quality in report.quality:
        before = interval(quality.before, quality.before_error)
        after = interval(quality.after, quality.after_error)
        change = change_of(quality)
        worse = f" ({change})" if change else ""
        lines.append((quality.metric, f"{before} -> {after}{worse}, {quality.rows:,} of {quality.split}"))
    if report.baseline is not None:
        lines.append(("baseline", report.baseline))
    if report.nonfinite_tensors:
        names = report.nonfinite_tensors
        more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
        lines.append(("NaN or Inf in", ", ".join(names[:_MOST_NAMES]) + more))
    shown = [line for each in lines for line in _line(each, width)]
    return shown if report.estimate is None else shown + estimate_lines(report.estimate)


def _base(report: Report) -> list[Line]:
    base, sums = report.base, changes(report)
    if base is None or sums is None:
        return []
    lines = [(
        "came from" if base.is_source else "compared with",
        f"{base.name}: {size(base.file_bytes)}, sparsity {percent(base.prunable.sparsity)}; "
        f"the files are now {base.bytes_ratio:.3f} of that",
    )]  # fmt: skip
    if sums.tensors:
        lines.append(("changes", in_figures(sums)))
    at = cut_at(sums)
    lines += [("cut", at)] if at else []
    if sums.moved is not None:
        lines.append(("largest change", f"{largest_change(sums.moved)} of {sums.moved.name}"))
    return lines + apart_in_words(base)


def _line(line: Line, width: int) -> list[str]:
    """A word and its figures, which go on below each other."""
    name, text = (clean(part) for part in line)
    indent = " " * (_INDENT if width >= 2 * _INDENT else 4)
    first = f"  {name:<{_INDENT - 3}} "
    return fitted(first + text, width, hang=len(indent) - 2).split("\n")


def estimate_lines(needs: Estimate) -> list[str]:
    """What a run would take: of a dry run."""
    took = "" if needs.seconds is None else f"; about {needs.seconds:.1f} s here"
    return [
        f"  would take     {size(needs.disk_bytes)} of disk ({size(needs.free_bytes)} are free), "
        f"{size(needs.memory_bytes)} of memory{took}",
        f"                 ({needs.rule})",
    ]


def _budgets(report: Report, width: int) -> list[str]:
    body = [tuple(clean(cell) for cell in budget_row(budget)) for budget in report.budgets]
    lines = columns(("budget", "limit", "value", "margin", "verdict"), body, width)
    for budget in report.budgets:
        if not budget.passed and budget.worst is not None:
            lines.append(fitted(clean(f"{budget.name}: worst is {budget.worst}"), width, hang=0))
    hints = [text for budget in report.budgets if (text := hint(budget))]
    return lines + [fitted(clean(text), width, hang=0) for text in hints]


def _kinds(report: Report, width: int) -> list[str]:
    body = [
        (
            clean(row.kind), f"{row.tensors:,}", f"{row.prunable:,}", f"{row.weights:,}", percent(row.share),
            percent(row.sparsity), size(row.stored_bytes),
        )
        for row in report.kinds
    ]  # fmt: skip
    return columns(("layer type", "tensors", "prunable", "weights", "of all", "zero", "bytes"), body, width)


def _tensors(report: Report, width: int) -> list[str]:
    largest = sorted(range(len(report.tensors)), key=lambda i: -report.tensors[i].weights)[:MOST_ROWS]
    body = [
        (
            clean(row.name), row.dtype, f"{row.weights:,}", percent(row.sparsity),
            size(row.stored_bytes),
            "prunable" if row.prunable else "kept",
        )
        for row in (report.tensors[i] for i in sorted(largest))
    ]  # fmt: skip
    lines = columns(("tensor", "dtype", "weights", "zero", "bytes", ""), body, width)
    if len(report.tensors) > len(largest):
        more = f"... and {len(report.tensors) - len(largest)} smaller tensors (all are in --json)"
        lines.append(fitted(more, width, hang=0))
    return lines
