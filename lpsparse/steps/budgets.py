"""Limits of budgets, as a person writes them: 0.8, 20MB, 2%, GLOB=0.9, 2:4=1.0."""

import re
from decimal import Decimal
from typing import NamedTuple

BUDGETS = ("min-sparsity", "max-bytes", "max-quality-drop", "max-layer-sparsity", "min-nm")
REPORTED_N_M = ("1:4", "2:4", "4:8")
_LIMIT = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([kMGT]?B|[KMGT]iB|%|)")
_UNITS = {"B": 1} | {
    f"{letter}{kind}": base**power
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, letter in enumerate("kMGT" if kind == "B" else "KMGT", start=1)
}


_SURELY_BYTES = 1000  # what is less and has no unit was hardly meant in bytes


class Limit(NamedTuple):
    """A budget's limit, and what it is of."""

    value: Decimal  # bytes, a fraction, or in the metric's unit
    pattern: str | None = None  # glob over tensor names; None: the whole model
    n_m: str | None = None
    relative: bool = False  # of the quality before


def limit_of(name: str, text: str) -> Limit:
    """`[GLOB=]LIMIT` of a budget, of min-nm `[GLOB=]N:M=LIMIT`. Raises ValueError."""
    pattern, _, limit = text.rpartition("=")
    n_m = None
    if name == "min-nm":
        pattern, _, n_m = pattern.rpartition("=")
        if n_m not in REPORTED_N_M:
            raise ValueError(f"--min-nm {text}: N:M=FRACTION, N:M one of {', '.join(REPORTED_N_M)}")
    found = _LIMIT.fullmatch(limit.strip())
    unit = found[2] if found else ""
    if not found or (unit and (name == "max-bytes") == (unit == "%")):
        example = {"max-bytes": "20MB", "max-quality-drop": "0.01 or 2%", "min-nm": "2:4=1.0"}.get(
            name, "0.8"
        )
        raise ValueError(f"--{name} {text}: not [GLOB=]LIMIT, such as {example}")
    if pattern and name == "max-quality-drop":
        raise ValueError(f"--{name} {text}: quality is of the whole model, it takes no GLOB")
    if name == "max-bytes" and not unit and Decimal(found[1]) < _SURELY_BYTES:
        asked = " or ".join(f"{found[1]}{each}" for each in ("MB", "kB", "B"))
        raise ValueError(f"--{name} {text}: no unit; write {asked}")
    value = Decimal(found[1]) * _UNITS.get(unit, 1) / (100 if unit == "%" else 1)
    if name not in ("max-bytes", "max-quality-drop") and value > 1:
        raise ValueError(f"--{name} {text}: a fraction is 0..1, such as 0.8")
    return Limit(value, pattern or None, n_m, name == "max-quality-drop" and unit == "%")
