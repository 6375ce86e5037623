"""Write the result of a sweep as a table for the terminal, and as Markdown for the summary of a CI step."""

from collections.abc import Mapping
from typing import Any

from lpsparse.reporting.markdown import code, plain, table
from lpsparse.reporting.records import Budget
from lpsparse.reporting.summary import budget_row, state
from lpsparse.reporting.text import clean, size

_MOST_ROWS = 100
Found = Mapping[str, Any]  # as `lpsparse.sweep` gives it


def verdict(found: Found) -> str:
    """One line. The folder of the winning model, if any, comes after it."""
    if found["smallest"] is None:
        return "no model meets the budgets"
    return "the smallest that meets the budgets"


def rows(found: Found) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings, and a line for the dense model and for each sparsity."""
    metric = next((clean(row["metric"]) for row in found["rows"] if row["metric"]), "quality")
    head = ("sparsity", "zeros", "files", "bitmask", f"{metric} before", "after", "budgets")
    dense = found["dense"]
    body = [
        ("dense", f"{dense['zeros']:,}", size(dense["file_bytes"]), "", "", _figure(dense["quality"]), "")
    ]
    for row in found["rows"]:
        body.append(
            (
                f"{row['sparsity']:g}",
                f"{row['zeros']:,}",
                size(row["file_bytes"]),
                size(row["bitmask_bytes"]),
                _figure(row["before"]),
                _figure(row["after"]),
                failure(row) or "ok",
            )
        )
    return head, body


def failure(row: Found) -> str:
    """The names of what fails at one sparsity; empty if nothing does."""
    failed = [name for name, *_ in _failed(row)]
    return "" if row["passed"] else ", ".join(failed) or "verify"


def failures(found: Found) -> list[str]:
    """A line for each budget that a sparsity fails, with its value and its limit."""
    return [
        f"{row['sparsity']:g}: {name}: {value}, limit {limit}"
        for row in found["rows"]
        for name, limit, value, *_ in _failed(row)
    ]


def _failed(row: Found) -> list[tuple[str, ...]]:
    """Name, limit, value, margin and state of the budgets that fail."""
    budgets = (Budget.model_validate(each) for each in row["budgets"])
    return [tuple(map(clean, budget_row(each))) for each in budgets if state(each) == "FAILED"]


def markdown(found: Found) -> str:
    """Verdict first, then the table."""
    head, body = rows(found)
    judged = any(row["budgets"] for row in found["rows"])
    word = ": FAILED" if found["smallest"] is None else ": passed" if judged else ""
    which = "" if found["smallest"] is None else f": {code(found['smallest'])}"
    lines = [f"## lpsparse sweep{word}", "", f"{code(found['recipe'])}: **{verdict(found)}**{which}", ""]
    shown = [
        (sparsity, *figures, code(said) if said not in ("", "ok") else said)
        for sparsity, *figures, said in body[:_MOST_ROWS]
    ]
    lines += table((*head[:4], plain(head[4]), *head[5:]), shown)
    failed = failures(found)
    if failed:
        lines += ["", *(f"- {code(text)}" for text in failed[:_MOST_ROWS])]
    if len(body) > _MOST_ROWS:
        lines += ["", f"... and {len(body) - _MOST_ROWS:,} more: see sweep.csv."]
    return "\n".join([*lines, ""])


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
