"""A kind of budget, and the limits that a person writes for it: 0.8, 20MB, 2%, GLOB=0.9, 2:4=1.0.

Light on purpose: the options of `lpsparse report --help` are made from these records.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from lpsparse.errors import UsageError

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report, TensorRow

_LIMIT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([kMGT]?B|[KMGT]iB|%|)")
_BYTES = {"B": 1} | {
    f"{letter}{kind}": base**power
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, letter in enumerate("kMGT" if kind == "B" else "KMGT", start=1)
}
_SURELY_BYTES = 1000  # a smaller number without a unit was hardly meant in bytes


class Limit(NamedTuple):
    """A budget's limit, and the tensors that it covers."""

    value: Decimal  # bytes, a fraction, or in the metric's unit
    pattern: str | None = None  # glob over tensor names; None: the model
    n_m: str | None = None
    relative: bool = False  # the limit is a share of the quality before


class Measured(NamedTuple):
    """The value of a budget in a report."""

    value: Decimal | float | None  # None: it was not measured, which fails the budget
    worst: str | None = None  # the tensor that decides, if one does
    passed: bool | None = None  # None: the value against the limit decides


@dataclass(frozen=True, slots=True)
class BudgetKind:
    """A member of the family BUDGETS."""

    name: str  # its option without the dashes
    help: str
    measure: Callable[[Report, Limit], Measured]
    example: str = "0.8"
    unit: Literal["share", "bytes", "metric"] = "share"
    at_least: bool = False  # the value must reach the limit; else it must not exceed it
    takes_glob: bool = True
    patterns: tuple[str, ...] = ()  # a limit names one of these N:M before its number

    @property
    def field(self) -> str:
        """The field of ReportStep that holds its limits."""
        return self.name.replace("-", "_")

    def limit(self, text: str) -> Limit:
        """Read `[GLOB=]LIMIT`, or `[GLOB=]N:M=LIMIT`. Raises ValueError."""
        glob, _, number = text.rpartition("=")
        n_m = None
        if self.patterns:
            glob, _, n_m = glob.rpartition("=")
            if n_m not in self.patterns:
                what = f"expected N:M=FRACTION with N:M one of {', '.join(self.patterns)}"
                raise ValueError(f"--{self.name} {text}: {what}")
        value, unit = self._number(text, number.strip())
        if glob and not self.takes_glob:
            raise ValueError(f"--{self.name} {text}: this budget is for the whole model and takes no GLOB")
        return Limit(value, glob or None, n_m, self.unit == "metric" and unit == "%")

    def _number(self, text: str, number: str) -> tuple[Decimal, str]:
        found = _LIMIT.fullmatch(number)
        unit = found[2] if found else ""
        if not found or (unit and (self.unit == "bytes") == (unit == "%")):
            form = "[GLOB=]LIMIT" if self.takes_glob else "LIMIT"
            raise ValueError(f"--{self.name} {text}: expected {form}, such as {self.example}")
        if self.unit == "bytes" and not unit and Decimal(found[1]) < _SURELY_BYTES:
            asked = " or ".join(f"{found[1]}{each}" for each in ("MB", "kB", "B"))
            raise ValueError(f"--{self.name} {text}: the unit is missing; write {asked}")
        value = Decimal(found[1]) * _BYTES.get(unit, 1) / (100 if unit == "%" else 1)
        if self.unit == "share" and value > 1:
            raise ValueError(f"--{self.name} {text}: expected a fraction 0..1, such as 0.8")
        return value, unit


def matching(report: Report, limit: Limit) -> list[TensorRow]:
    """The tensors that a limit covers: those of its pattern, or the prunable ones.

    Raises UsageError for a pattern that matches no tensor.
    """
    if limit.pattern is None:
        return [row for row in report.tensors if row.prunable]
    found = [row for row in report.tensors if fnmatchcase(row.name, limit.pattern)]
    if not found:
        raise no_tensor(f"{limit.pattern}={limit.value}")
    return found


def no_tensor(budget: str) -> UsageError:
    """The error for a budget whose pattern matches no tensor."""
    what = f"budget {budget}: the pattern matches no tensor"
    return UsageError(290, what, hint="list the names with `lpsparse inspect MODEL`")
