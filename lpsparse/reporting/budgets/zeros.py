"""Budgets of zeros: how many there are, how many a tensor may have, and where they must lie."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING

from lpsparse.reporting.budgets.base import BudgetKind, Limit, Measured, matching

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report

N_M = {"1:4": 1, "2:4": 2, "4:8": 4}  # the patterns that a report counts -> non-zeros that a group may have


def _min_sparsity(report: Report, limit: Limit) -> Measured:
    rows = matching(report, limit)
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    if not weights:
        return Measured(None)
    enough = zeros >= floor(limit.value * weights)  # as many as `prune --sparsity` would leave
    return Measured(zeros / weights, passed=enough and (zeros > 0 or limit.value == 0))


def _max_layer_sparsity(report: Report, limit: Limit) -> Measured:
    rows = [row for row in matching(report, limit) if row.weights]
    worst = max(rows, key=lambda row: row.sparsity, default=None)
    return Measured(worst.sparsity, worst.name) if worst else Measured(None)


def _min_nm(report: Report, limit: Limit) -> Measured:
    assert limit.n_m is not None
    met = whole = 0
    worst: tuple[float, str] | None = None
    for row in matching(report, limit):
        if row.detail is None:  # a report that counted zeros only
            return Measured(None)
        part, count = row.groups(limit.n_m)
        met, whole = met + part, whole + count
        if count and (worst is None or part / count < worst[0]):
            worst = part / count, row.name
    passed = whole > 0 and met >= limit.value * whole
    return Measured(met / whole if whole else None, worst[1] if worst else None, passed)


MIN_SPARSITY = BudgetKind(
    "min-sparsity",
    "Budget [GLOB=]FRACTION: minimum sparsity of the prunable (or matching) weights.",
    _min_sparsity,
    at_least=True,
)
MAX_LAYER_SPARSITY = BudgetKind(
    "max-layer-sparsity",
    "Budget [GLOB=]FRACTION: maximum sparsity of any prunable (or matching) tensor.",
    _max_layer_sparsity,
)
MIN_NM = BudgetKind(
    "min-nm",
    "Budget [GLOB=]N:M=FRACTION: minimum share of groups of M with at most N non-zeros.",
    _min_nm,
    example="2:4=1.0",
    at_least=True,
    patterns=tuple(N_M),
)
