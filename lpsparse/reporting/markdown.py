"""Write the report as GitHub's Markdown, for the summary of a step and for a comment on a pull request.

Names are code: text from a checkpoint cannot become a link, a mention, HTML or a column."""

import re
from collections.abc import Iterable, Iterator, Sequence

from lpsparse.reporting.records import Report, TensorRow
from lpsparse.reporting.summary import (
    alerts,
    apart_in_words,
    budget_name,
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
    state,
    stores,
    verdict,
)
from lpsparse.reporting.text import clean, percent, shorten, size

MARKER = "<!-- lpsparse-report -->"  # by which a comment is found again, to be replaced
SUMMARY_BYTES = 900 * 1024  # GitHub drops a step's summary whole when it is over 1,024 KiB
# GitHub's limit is 65,536 characters. As many bytes of UTF-8 are as few or fewer, however they are counted.
COMMENT_BYTES = 65_535
_KEPT_BYTES = 2000  # for headings of what is left out, and for the fold
_MOST_ROWS = 20  # of tensors outside of the fold
_MOST_LINES = 40  # of a table that a command line or an edited report.json can make long
_NAME = 120
_CODE = re.compile(r"[\w./:+\[\](),=%?*… -]*[\w./:+\[\](),=%?*-]")  # means nothing between back-ticks
_PLAIN = re.compile(r"[\w .,;:?()%'`/=+-]*")
_LINK = re.compile(r"://|www\.|::", re.IGNORECASE)
_TENSORS = ("tensor", "dtype", "weights", "zero", "bytes", "pruning")


def render(report: Report, most_bytes: int = SUMMARY_BYTES) -> str:
    """Verdict first. Sections that are too long are left out, with a note."""
    largest = sorted(range(len(report.tensors)), key=lambda i: -report.tensors[i].weights)[:_MOST_ROWS]
    shown = [report.tensors[i] for i in sorted(largest)]
    sections = {
        "Budgets": _budgets(report),
        "Before and after": _quality(report),
        "Totals": _totals(report),
        "Layer types": _kinds(report),
        "Not measured": _missing(report),
        f"Largest {len(shown)} of {len(report.tensors):,} tensors": table(_TENSORS, map(_tensor, shown)),
    }
    text = "\n".join(_head(report)) + "\n"
    for title, section in sections.items():
        lines = list(section)
        added = "\n".join(("", f"### {title}", "", *lines, ""))
        if len((text + added).encode()) > most_bytes - _KEPT_BYTES:
            added = f"\n### {title}\n\nToo long for this page: see report.json.\n"
        text += added if lines else ""
    kept = set(largest)
    rest = [row for i, row in enumerate(report.tensors) if i not in kept]
    return text + _fold(rest, most_bytes - len(text.encode()))


def comment(report: Report) -> str:
    """For a pull request: short enough, with a marker to find it by."""
    return f"{MARKER}\n{render(report, COMMENT_BYTES - len(MARKER) - 1)}"


def code(text: str) -> str:
    """Text from outside as code on one line. Characters with a meaning are entities."""
    text = shorten(clean(text), _NAME)
    if _CODE.fullmatch(text) and not text.startswith(" "):
        return f"`{text}`"
    signs = (char if char.isalnum() or char in " .-" else f"&#{ord(char)};" for char in text)
    return f"<code>{''.join(signs) or ' '}</code>"


def plain(text: str) -> str:
    """A sentence of ours. If an edited report.json has other text, it becomes code."""
    text = shorten(clean(text), 400)
    if _PLAIN.fullmatch(text) and not _LINK.search(text) and text.count("`") % 2 == 0:
        return text
    return code(text)


def _head(report: Report) -> Iterator[str]:
    alarm = nonfinite(report)
    met = "" if not report.budgets else ": passed"
    word = ": FAILED" if not report.passed else ": NOT FINITE" if alarm else met
    yield f"## lpsparse{word}"
    yield ""
    if alarm:
        yield f"**NOT FINITE: {alarm}**: {', '.join(code(name) for name in report.nonfinite_tensors[:5])}"
        yield ""
    yield f"{code(report.model)}: **{verdict(report)}**"
    for alert in alerts(report):
        names = ", ".join(code(name) + remark for name, remark in alert.tensors)
        yield from ("", f"Warning: {alert.what} {names}{alert.hint}.")


def _budgets(report: Report) -> Iterator[str]:
    if not report.budgets:
        return
    body: list[Sequence[str]] = []
    for budget in report.budgets[:_MOST_LINES]:
        name, limit, value, margin, _ = budget_row(budget)
        worst = f" (worst: {code(budget.worst)})" if budget.worst and not budget.passed else ""
        said = {"FAILED": "**FAILED**"}.get(state(budget), state(budget))
        body.append((code(name), limit, value, margin, said + worst))
    yield from table(("budget", "limit", "value", "margin", "verdict"), body)
    if len(report.budgets) > _MOST_LINES:
        yield from ("", f"... and {len(report.budgets) - _MOST_LINES:,} more (failed ones come first).")
    if report.baseline is not None:
        yield from ("", f"Baseline: {code(report.baseline)}")
    hints = [hint(budget, code(budget_name(budget))) for budget in report.budgets[:_MOST_LINES]]
    if any(hints):
        yield from ("", *(f"- {text}" for text in hints if text))


def _totals(report: Report) -> Iterator[str]:
    every, sums = report.all, changes(report)
    rows = [("all weights", f"{every.zeros:,} of {every.weights:,} zero ({percent(every.sparsity)})")]
    rows += [*stores(report), ("opens with", report.opens_with), *neighbours(report)[:_MOST_LINES]]
    rows = [(plain(name), plain(text)) for name, text in (*rows, *oddities(report))]
    if sums is not None and sums.tensors:
        at = cut_at(sums)
        rows += [("changes", in_figures(sums)), *([("cut", at)] if at else [])]
        if sums.moved is not None:
            rows.append(("largest change", largest_change(sums.moved, code(sums.moved.name))))
    if report.base is not None:
        rows += [(name, code(names)) for name, names in apart_in_words(report.base)]
    rows += [(name, f"{plain(value)} of {code(tensor)}") for name, value, tensor in singular(report)]
    yield from table(("figure", "value"), rows)
    yield from ("", f"Counted: {plain(report.rule)}.")


def _quality(report: Report) -> Iterator[str]:
    """Before and after, with 95 % intervals if standard errors are recorded."""
    body: list[Sequence[str]] = []
    for each in report.quality[:_MOST_LINES]:
        before, after = interval(each.before, each.before_error), interval(each.after, each.after_error)
        of = f"{each.rows:,} of {code(each.split)}"
        body.append((code(each.metric), before, after, change_of(each), of))
    base = report.base
    if base is not None:
        of = f"{'source' if base.is_source else 'compared with'} {code(base.name)}"
        body.append(
            (
                "prunable weights zero",
                percent(base.prunable.sparsity),
                percent(report.prunable.sparsity),
                "",
                of,
            )
        )
        held = (size(base.file_bytes), size(report.bytes.file_bytes))
        body.append(("weight files", *held, f"{base.bytes_ratio:.3f} of it", of))
    if not body:
        return
    yield from table(("figure", "before", "after", "change", "measured on"), body)
    if any(each.after_error is not None for each in report.quality):
        yield from ("", "± is half of a 95 % interval: 1.96 standard errors, examples taken as independent.")


def _kinds(report: Report) -> Iterator[str]:
    body = [
        (
            plain(row.kind),
            f"{row.tensors:,}",
            f"{row.weights:,}",
            percent(row.share),
            percent(row.sparsity),
            size(row.stored_bytes),
        )
        for row in report.kinds[:_MOST_LINES]
    ]
    if body:
        yield from table(("type", "tensors", "weights", "of all", "zero", "bytes"), body)


def _missing(report: Report) -> Iterator[str]:
    if report.not_measured:
        yield from (f"- {plain(text)}" for text in report.not_measured[:_MOST_LINES])


def _fold(rows: list[TensorRow], most_bytes: int) -> str:
    """The other tensors in a closed section, as many as fit."""
    if not rows:
        return ""
    lines = ["", f"<details><summary>The other {len(rows):,} tensors</summary>", "", *table(_TENSORS, ())]
    end = ["", "</details>", ""]
    left = most_bytes - sum(len(line.encode()) + 1 for line in (*lines, *end)) - 100
    for i, row in enumerate(rows):
        line = _row(_tensor(row))
        left -= len(line.encode()) + 1
        if left < 0:
            end.insert(1, f"... and {len(rows) - i:,} more: see report.json.\n")
            break
        lines.append(line)
    return "\n".join([*lines, *end])


def _tensor(row: TensorRow) -> Sequence[str]:
    return (
        code(row.name),
        code(row.dtype),
        f"{row.weights:,}",
        percent(row.sparsity),
        size(row.stored_bytes),
        "prunable" if row.prunable else "kept",
    )


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [_row(head), _row(rule), *(_row(row) for row in body)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
