"""Write the report as CSV (RFC 4180): one row per tensor, columns named by their path in report.json.

A spreadsheet must not take a name for a formula, nor a terminal or a CI runner for an order. In cells of
text, backslashes and what does not print stand as in JSON strings, and an apostrophe leads a cell that begins
with one of = + - @ : space or apostrophe. To get the text back, take a leading apostrophe away, then read the
cell as the inside of a JSON string (in which quotation marks are as they are)."""

import csv
import io
import json
from dataclasses import fields
from typing import Any

from lpsparse.reporting.records import Change, Detail, Report, Spectrum, TensorRow
from lpsparse.reporting.text import IN_JSON, without_order

_PARTS = ("detail", "spectrum", "change")
_PAIRS = ("n_m", "empty")
_OWN = tuple(each.name for each in fields(TensorRow) if each.name not in _PARTS)
_DETAIL = tuple(each.name for each in fields(Detail) if each.name not in (*_PAIRS, "histogram"))
_SPECTRUM, _CHANGE = (tuple(each.name for each in fields(of)) for of in (Spectrum, Change))


def render(report: Report) -> str:
    """All figures of all tensors; an unknown one is an empty cell."""
    pairs = [(kind, key) for kind in _PAIRS for key in _keys(report, kind)]
    heads = [
        *_OWN,
        *(f"detail.{name}" for name in _DETAIL),
        "detail.histogram.first",
        "detail.histogram.counts",
    ]
    heads += [f"detail.{kind}.{key}.{end}" for kind, key in pairs for end in ("part", "of")]
    heads += [f"spectrum.{name}" for name in _SPECTRUM]
    heads += [f"change.{name}" for name in _CHANGE]
    out = io.StringIO(newline="")
    writer = csv.writer(out)  # CRLF and doubled quotation marks, as RFC 4180 has them
    writer.writerow(map(_cell, heads))
    for row in report.tensors:
        writer.writerow(map(_cell, _values(row, pairs)))
    return out.getvalue()


def _keys(report: Report, kind: str) -> list[str]:
    return sorted({key for row in report.tensors if row.detail for key in getattr(row.detail, kind)})


def _values(row: TensorRow, pairs: list[tuple[str, str]]) -> list[Any]:
    detail, found = row.detail, [getattr(row, name) for name in _OWN]
    found += _of(detail, _DETAIL)
    found += [None, None] if detail is None else [detail.histogram.first, detail.histogram.counts]
    for kind, key in pairs:
        found += (getattr(detail, kind).get(key) if detail else None) or (None, None)
    return found + _of(row.spectrum, _SPECTRUM) + _of(row.change, _CHANGE)


def _of(part: Detail | Spectrum | Change | None, names: tuple[str, ...]) -> list[Any]:
    return [None if part is None else getattr(part, name) for name in names]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):  # shapes, counts
        return " ".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(value, str):
        return json.dumps(value)
    text = without_order("".join(_shown(char) for char in value), IN_JSON)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", ":", "'", " ") and text else text


def _shown(char: str) -> str:
    return char if char.isprintable() and char != "\\" else json.dumps(char)[1:-1]
