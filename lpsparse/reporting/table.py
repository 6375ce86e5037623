"""Write the report for a terminal of 80 columns, or a pipe. The verdict comes last, before the prompt."""

from lpsparse.reporting.records import Estimate, Report, TensorRow
from lpsparse.reporting.summary import (
    alerts,
    apart_in_words,
    beside,
    budget_line,
    budgets_in_short,
    changes,
    costs,
    cut_at,
    hint,
    in_figures,
    largest_change,
    neighbours,
    nonfinite,
    oddities,
    shrinks,
    singular,
    state,
    stores,
    verdict,
    zeros,
)
from lpsparse.reporting.text import Fold, clean, columns, fitted, folded, percent, size

MOST_ROWS = 15
_LARGE = 0.01  # of all weights: a tensor that is kept is shown from here on
_MOST_NAMES = 5
_INDENT = 17  # where the figures of the totals stand
_COLORS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "FAILED": "\x1b[31m", "NOT FINITE": "\x1b[31m"}
_PLAIN = "\x1b[0m"
Line = tuple[str, str]


def render(report: Report, width: int = 80, *, color: bool = False, full: bool = False) -> str:
    """Tensors, layer types, totals, verdict. `full`: every tensor, and the patterns of zeros."""
    warned = [fitted(clean(f"warning: {alert}"), width) for alert in alerts(report)]
    return _joined(
        [_tensors(report, width, full), *_middle(report, width, full), warned, _verdict(report, width, color)]
    )


def summary(report: Report, width: int = 80, *, color: bool = False) -> str:
    """The same without the tensors and the warnings, for a run that has shown them."""
    return _joined([*_middle(report, width, False), _verdict(report, width, color)])


def _joined(parts: list[list[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part)


def _middle(report: Report, width: int, full: bool) -> list[list[str]]:
    return [_kinds(report, width) if len(report.kinds) > 1 else [], _totals(report, width, full)]


def headline(report: Report) -> str:
    return f"{clean(report.model)}: {verdict(report)}"


def _verdict(report: Report, width: int, color: bool) -> list[str]:
    """Zeros, size, quality and budgets; the failed budgets come last."""
    lines: list[str] = [fitted(clean(f"{report.model}: {zeros(report)}"), width, hang=2)]
    small = shrinks(report)
    facts: list[Line] = [("size", small)] if small else []
    for line in (*facts, *costs(report)):
        lines += _line(line, width)
    return lines + budget_lines(report, width, color=color)


def budget_lines(report: Report, width: int, *, color: bool) -> list[str]:
    """One line per budget, and one for all of them."""
    lines: list[str] = []
    for budget in reversed(report.budgets):
        lines += _colored(_line((state(budget), budget_line(budget)), width), state(budget), color)
    lines += [fitted(clean(text), width, hang=0) for each in report.budgets if (text := hint(each))]
    alarm = nonfinite(report)
    if alarm is not None:
        lines += _colored([fitted(f"NOT FINITE: {alarm}", width)], "NOT FINITE", color)
    if report.budgets:
        failed = not report.passed
        word = "FAILED" if failed else "ok" if all(each.passed for each in report.budgets) else "warn"
        lines += _colored([fitted(f"{word}: {budgets_in_short(report)}", width)], word, color)
    return lines


def _colored(lines: list[str], word: str, color: bool) -> list[str]:
    """The lines with `word` in the first one coloured."""
    return [lines[0].replace(word, f"{_COLORS[word]}{word}{_PLAIN}", 1), *lines[1:]] if color else lines


def _totals(report: Report, width: int, full: bool) -> list[str]:
    every = report.all
    lines: list[Line] = [
        ("all weights", f"{every.zeros:,} of {every.weights:,} zero ({percent(every.sparsity)})"),
        *stores(report)[:1],  # the verdict has the others
        ("opens with", report.opens_with),
        *_base(report),
        *((*neighbours(report), *oddities(report)) if full else ()),
        *((name, f"{value} of {tensor}") for name, value, tensor in singular(report)),
    ]
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
    lines = [beside(base)]
    if sums.tensors:
        lines.append(("vs base", in_figures(sums)))
    at = cut_at(sums)
    lines += [("cut", at)] if at else []
    if sums.moved is not None:
        lines.append(("largest change", largest_change(sums.moved, sums.moved.name)))
    return lines + apart_in_words(base)


def _line(line: Line, width: int) -> list[str]:
    """A name and its text, wrapped below each other."""
    name, text = (clean(part) for part in line)
    indent = " " * (_INDENT if width >= 2 * _INDENT else 4)
    first = f"  {name:<{_INDENT - 3}} "
    return fitted(first + text, width, hang=len(indent) - 2).split("\n")


def estimate_lines(needs: Estimate) -> list[str]:
    """What a run would need, for a dry run."""
    took = "" if needs.seconds is None else f"; about {needs.seconds:.1f} s here"
    return [
        f"  would take     {size(needs.disk_bytes)} of disk ({size(needs.free_bytes)} are free), "
        f"{size(needs.memory_bytes)} of memory{took}",
        f"                 ({needs.rule})",
    ]


def _kinds(report: Report, width: int) -> list[str]:
    body = [
        (
            clean(row.kind),
            f"{row.tensors:,}",
            f"{row.prunable:,}",
            f"{row.weights:,}",
            percent(row.share),
            percent(row.sparsity),
            size(row.stored_bytes),
        )
        for row in report.kinds
    ]
    return columns(("layer type", "tensors", "prunable", "weights", "of all", "zero", "bytes"), body, width)


def _tensors(report: Report, width: int, full: bool) -> list[str]:
    """The tensors that differ most from the mean, by weights, then the largest."""
    if full:
        rows = [Fold(row.name, (row,)) for row in report.tensors]
    else:
        rows = folded(report.tensors, lambda row: row.name, lambda row: (row.shape, row.dtype, row.prunable))
    mean = report.prunable.sparsity

    def matters(place: int) -> tuple[float, int]:
        some = rows[place].rows
        apart = sum(abs(row.zeros - mean * row.weights) for row in some if row.prunable)
        return -round(apart), -sum(row.weights for row in some)

    chosen = list(range(len(rows)))
    if not full:
        large = _LARGE * report.all.weights
        some = [i for i in chosen if any(row.prunable or row.weights > large for row in rows[i].rows)]
        chosen = sorted(sorted(some or chosen, key=matters)[:MOST_ROWS])
    body = [_cells(rows[place]) for place in chosen]
    lines = columns(("tensor", "dtype", "weights", "zero", "bytes", "pruning"), body, width)
    left = len(report.tensors) - sum(len(rows[place].rows) for place in chosen)
    if left:
        lines.append(fitted(f"... and {left:,} more tensors (--full shows all)", width, hang=0))
    return lines


def _cells(fold: Fold[TensorRow]) -> tuple[str, ...]:
    some, first = fold.rows, next(iter(fold.rows))
    low, high = min(row.sparsity for row in some), max(row.sparsity for row in some)
    return (
        clean(fold.name) + (f"  x{len(some)}" if len(some) > 1 else ""),
        first.dtype,
        f"{sum(row.weights for row in some):,}",
        percent(low) if low == high else f"{percent(low).removesuffix(' %')}..{percent(high)}",
        size(sum(row.stored_bytes for row in some)),
        "prunable" if first.prunable else "kept",
    )
