"""What GitHub Actions is told: the summary of the step, and annotations.

The runner reads commands from stderr as well as from stdout (one OutputManager takes both):
annotations stand on stderr, so that stdout stays data."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpsparse.reporting.text import clean, shorten

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report

_MOST = 10  # annotations of a kind that GitHub shows of a step
_STEP_BYTES = 1000 * 1024  # GitHub drops what is over 1,024 KiB, with all that other commands wrote there
_LEAST_BYTES = 10_000  # that are worth it


def is_runner() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def summarise(report: "Report") -> str | None:
    """Append Markdown to the step's summary, where there is one. What went wrong, if anything did."""

    def text(room: int) -> str:
        from lpsparse.reporting.markdown import SUMMARY_BYTES, render

        return render(report, min(SUMMARY_BYTES, room))

    return _append(text)


def summarise_sweep(found: dict[str, Any]) -> str | None:
    """Likewise of a sweep: its verdict and its table."""

    def text(_: int) -> str:
        from lpsparse.reporting.sweep import markdown

        return markdown(found)

    return _append(text)


def summarise_error(code: str, what: str, hint: str) -> str | None:
    """Likewise of what ended a command: a heading, and what it said as code."""

    def text(_: int) -> str:
        return f"## lpsparse: {code}\n{_code(what)} hint: {_code(hint)}\n"

    return _append(text)


def _append(text: Callable[[int], str]) -> str | None:
    """Add `text`, given the bytes that there is room for, to the step's summary, where there is one."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return None
    path = Path(name)
    try:
        if path.exists() and not path.is_file():
            return f"GITHUB_STEP_SUMMARY: {name}: is no file; no summary was written"
        before = path.stat().st_size if path.exists() else 0
        if _STEP_BYTES - before < _LEAST_BYTES:
            return f"GITHUB_STEP_SUMMARY: {name}: {before:,} bytes are there, no summary was added"
        added = text(_STEP_BYTES - before)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"\n{added}" if before else added)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        return f"GITHUB_STEP_SUMMARY: {name}: {why}; no summary was written"
    return None


def annotations(report: "Report") -> list[str]:
    """An error for each failed budget, a warning for each that warns and each alarm; ten of each at most."""
    from lpsparse.reporting.summary import budget_row, lost_of, nonfinite, state

    found: dict[str, list[tuple[str, str]]] = {"error": [], "warning": []}
    alarm = nonfinite(report)
    if alarm:
        found["warning"].append(("lpsparse: not finite", f"{alarm}: {report.nonfinite_tensors[0]}"))
    lost = lost_of(report)
    if lost is not None:
        found["warning"].append(("lpsparse: tensors of BASE", f"{report.model}: {lost}"))
    for budget in report.budgets:
        name, limit, value, margin, _ = budget_row(budget)
        worst = "" if budget.worst is None else f", worst {shorten(budget.worst, 200)}"
        text = f"{report.model}: limit {limit}, value {value}, margin {margin or 'unknown'}{worst}"
        kind = {"FAILED": "error", "warn": "warning"}.get(state(budget))
        if kind is not None:
            found[kind].append((f"lpsparse: {name} failed", text))
    return [line for kind, notes in found.items() for line in _lines(kind, notes)]


def sweep_annotations(found: dict[str, Any]) -> list[str]:
    """One error where no model meets the budgets, with what each of them fails."""
    from lpsparse.reporting.sweep import failure, failures, verdict

    if found["smallest"] is not None:
        return []
    failed = [f"sparsity {text}" for text in failures(found)]
    why = failed or [f"sparsity {row['sparsity']:g}: {failure(row)}" for row in found["rows"]]
    if len(why) > _MOST:
        why = [*why[: _MOST - 1], f"{len(why) - _MOST + 1} more are in the table"]
    return [command("error", "lpsparse: sweep", f"{found['recipe']}: {verdict(found)}", *why)]


def _lines(kind: str, notes: list[tuple[str, str]]) -> list[str]:
    if len(notes) > _MOST:
        left = len(notes) - _MOST + 1
        notes = [*notes[: _MOST - 1], ("lpsparse", f"{left} more are not shown here, but in the report")]
    return [command(kind, title, text) for title, text in notes]


def command(kind: str, title: str, *lines: str) -> str:
    """A line that the runner makes an annotation of. Its signs cannot be forged by what is told."""
    text = "%0A".join(map(_escaped, lines))
    return f"::{kind} title={_escaped(title).replace(':', '%3A').replace(',', '%2C')}::{text}"


def _escaped(text: str) -> str:
    return clean(shorten(text, 1000)).replace("%", "%25")  # CR and LF are cleaned away


def _code(text: str) -> str:
    """One line as code, between more back-ticks than it has in a row."""
    text = clean(shorten(text, 1000))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
