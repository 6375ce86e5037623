"""Budgets of what a model costs: bytes on disk, and quality that was lost."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from lpsparse.reporting.budgets.base import BudgetKind, Limit, Measured, matching

if TYPE_CHECKING:
    from lpsparse.checkpoint.manifest import Quality
    from lpsparse.reporting.records import Report


def _max_bytes(report: Report, limit: Limit) -> Measured:
    if limit.pattern is None:
        return Measured(report.bytes.file_bytes)
    return Measured(sum(row.stored_bytes for row in matching(report, limit)))


def _max_quality_drop(report: Report, limit: Limit) -> Measured:
    known = [each for each in report.quality if not each.of_cut]
    drops = [drop for each in known if (drop := drop_of(each, relative=limit.relative)) is not None]
    return Measured(max(drops, default=None))


def drop_of(quality: Quality, *, relative: bool = False) -> Decimal | None:
    """How much worse `after` is than `before`, in the metric's unit; negative when better.

    In decimals, as figures are written: 0.90 to 0.89 is 0.01, which binary fractions cannot hold.
    """
    if quality.before is None or (relative and not quality.before):
        return None
    before, after = Decimal(repr(quality.before)), Decimal(repr(quality.after))
    drop = before - after if quality.higher_is_better else after - before
    return drop / abs(before) if relative else drop


MAX_BYTES = BudgetKind(
    "max-bytes",
    "Budget [GLOB=]BYTES: maximum size of the weight files, or of matching tensors: 20MB, 1.5GiB.",
    _max_bytes,
    example="20MB",
    unit="bytes",
)
MAX_QUALITY_DROP = BudgetKind(
    "max-quality-drop",
    "Budget: maximum drop of the quality that finetune or `eval --save` recorded, in the metric's unit or in "
    "% of the quality before.",
    _max_quality_drop,
    example="0.01 or 2%",
    unit="metric",
    takes_glob=False,
)
