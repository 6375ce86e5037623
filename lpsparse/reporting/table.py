"""The report on a terminal: for 80 columns (its tables fit fewer); it says what each figure is of."""

from lpsparse.reporting.budgets import quality_drop
from lpsparse.reporting.records import Estimate, Report
from lpsparse.reporting.text import clean, columns, size

MOST_ROWS = 40


def render(report: Report, width: int = 80) -> str:
    """Verdict first, then totals, then the tensors with the most weights."""
    lines = [f"{clean(report.model)}: {_verdict(report)}", ""]
    lines += _totals(report)
    if report.budgets:
        lines += ["", *_budgets(report, width)]
    lines += ["", *_tensors(report, width)]
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    share = report.prunable
    be = "are" if report.estimate is None else "would be"
    text = f"{share.zeros:,} of {share.weights:,} prunable weights {be} zero ({100 * share.sparsity:.2f} %)"
    if report.budgets:
        failed = sum(not budget.passed for budget in report.budgets)
        text += f"; {failed} of {len(report.budgets)} budgets failed" if failed else "; all budgets met"
    return text


def _totals(report: Report) -> list[str]:
    every, held = report.all, report.bytes
    lines = [
        f"  all weights    {every.zeros:,} of {every.weights:,} zero ({100 * every.sparsity:.2f} %)",
        f"  weight files   {size(held.file_bytes)} ({held.file_bytes:,} bytes, {report.layout}); "
        f"{100 * held.zero_share:.2f} % of the dense bytes are zeros",
        f"  as bitmask     {size(held.bitmask_bytes)}",
        f"  opens with     {report.opens_with}",
    ]
    if report.base is not None:
        base = report.base
        lines.append(
            f"  came from      {clean(base.name)}: {size(base.file_bytes)}, sparsity "
            f"{100 * base.prunable.sparsity:.2f}"
            f" %; the files are now {base.bytes_ratio:.3f} of that"
        )
    if report.estimate is not None:
        lines += estimate_lines(report.estimate)
    for quality in report.quality:
        before = "no head yet" if quality.before is None else f"{quality.before:.4f}"
        drop = quality_drop(quality)
        word = "worse by" if drop and drop > 0 else "better by"
        worse = "" if drop is None else f" ({word} {abs(drop):.4f})" if drop else " (unchanged)"
        lines.append(
            f"  {quality.metric:<14} {before} -> {quality.after:.4f}{worse}, {quality.rows:,} of "
            f"{clean(quality.split)}"
        )
    if report.nonfinite_tensors:
        lines.append(f"  NaN or Inf in  {', '.join(clean(name) for name in report.nonfinite_tensors[:5])}")
    return lines


def estimate_lines(needs: Estimate) -> list[str]:
    """What a run would take: of a dry run."""
    took = "" if needs.seconds is None else f"; about {needs.seconds:.1f} s here"
    return [
        f"  would take     {size(needs.disk_bytes)} of disk ({size(needs.free_bytes)} are free), "
        f"{size(needs.memory_bytes)} of memory{took}",
        f"                 ({needs.rule})",
    ]


def _budgets(report: Report, width: int) -> list[str]:
    body = []
    for budget in report.budgets:
        value = "not recorded" if budget.value is None else _figure(budget.value)
        body.append((budget.name, _figure(budget.limit), value, "ok" if budget.passed else "FAILED"))
    return columns(("budget", "limit", "value", "verdict"), body, width)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"


def _tensors(report: Report, width: int) -> list[str]:
    shown = sorted(report.tensors, key=lambda row: -row.weights)[:MOST_ROWS]
    kept = [row for row in report.tensors if row in shown]
    body = [
        (
            clean(row.name), row.dtype, f"{row.weights:,}", f"{100 * row.sparsity:.1f} %",
            size(row.stored_bytes),
            "prunable" if row.prunable else "kept",
        )
        for row in kept
    ]  # fmt: skip
    lines = columns(("tensor", "dtype", "weights", "zero", "bytes", ""), body, width)
    if len(report.tensors) > len(shown):
        lines.append(f"... and {len(report.tensors) - len(shown)} smaller tensors (all are in --json)")
    return lines
