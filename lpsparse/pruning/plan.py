"""Decide what to cut, as plain data: one threshold and
a share of its ties for each tensor. Writes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

import numpy as np

from lpsparse.checkpoint.dtypes import Bits, key_of, magnitudes, value_of
from lpsparse.checkpoint.opening import Blocks, Checkpoint, Tensor
from lpsparse.checkpoint.rewrite import Cut, check_finite
from lpsparse.errors import VerdictError
from lpsparse.pruning.gap import Band, find_band
from lpsparse.pruning.prunable import choose
from lpsparse.pruning.select import cut_rows, cut_smallest, kth_smallest, target_count

Scope = Literal["global", "tensor", "row"]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor."""

    prunable: bool
    reason: str
    threshold: int = 0  # magnitude key: below it is cut
    ties: int = 0  # how many that equal it are cut, first positions first
    row_sparsity: Decimal | None = None  # cut this much of each row instead


@dataclass(frozen=True, slots=True)
class Plan:
    tensors: dict[str, TensorPlan]
    wide: bool  # keys are those of float64
    threshold: float | None  # the one magnitude of a global cut
    band: Band | None  # what --gap found

    def cut(self, tensor: Tensor) -> Cut | None:
        """The function that applies this plan to the blocks of a tensor; None where nothing is cut."""
        plan = self.tensors[tensor.name]
        if not plan.prunable:
            return None

        def apply(blocks: Blocks) -> Blocks:
            ties = plan.ties
            for row, block in blocks:
                keys, cut = magnitudes(block, tensor.dtype, wide=self.wide), block.copy()
                if plan.row_sparsity is not None:
                    cut_rows(cut, keys, plan.row_sparsity)
                else:
                    ties -= cut_smallest(cut, keys, plan.threshold, ties)
                yield row, cut

        return apply


def plan_prune(
    source: Checkpoint,
    *,
    sparsity: Decimal | None = None,
    below: float | None = None,
    gap: bool = False,
    scope: Scope = "global",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> Plan:
    """Exactly one of `sparsity` (met exactly within each scope), `below` and `gap` decides.

    Ties go by tensor name, then position. Raises InputError on NaN or Inf in a prunable tensor, UsageError
    on patterns that match nothing, VerdictError when `gap` finds no band.
    """
    chosen = choose(((t.name, t.dtype, t.shape) for t in source.tensors), include, exclude)
    units = _Units(source, [tensor for tensor in source.tensors if chosen[tensor.name][0]])
    plans = {name: TensorPlan(yes, reason) for name, (yes, reason) in chosen.items()}
    threshold, band = None, None
    if gap:
        band = _band(units)
        threshold = band.threshold
    elif below is not None:
        units.check()
        threshold = below
    if threshold is not None:
        key = key_of(threshold, wide=units.wide)
        plans |= {t.name: TensorPlan(True, chosen[t.name][1], key) for t in units.tensors}
    elif scope == "row":
        units.check()
        plans |= {t.name: TensorPlan(True, chosen[t.name][1], row_sparsity=sparsity) for t in units.tensors}
    else:
        assert sparsity is not None
        groups = [units.tensors] if scope == "global" else [[tensor] for tensor in units.tensors]
        for group in groups:
            key, shares = units.select(group, sparsity)
            plans |= {t.name: TensorPlan(True, chosen[t.name][1], key, shares[t.name]) for t in group}
            threshold = value_of(key, wide=units.wide) if scope == "global" else None
    return Plan(plans, units.wide, threshold, band)


class _Units:
    """The prunable tensors, streamed as magnitude keys that compare across dtypes."""

    def __init__(self, source: Checkpoint, tensors: list[Tensor]) -> None:
        self.source = source
        self.tensors = sorted(tensors, key=lambda tensor: tensor.name)
        self.wide = any(tensor.dtype == "F64" for tensor in tensors)

    def keys(self, group: list[Tensor]) -> Iterator[Bits]:
        for tensor in group:
            for _, block in tensor.blocks():
                keys = magnitudes(block, tensor.dtype, wide=self.wide)
                check_finite(f"{self.source.name}/{tensor.file}", tensor, keys)
                yield keys

    def check(self) -> None:
        for _ in self.keys(self.tensors):
            pass

    def select(self, group: list[Tensor], sparsity: Decimal) -> tuple[int, dict[str, int]]:
        """Threshold key of a group and each tensor's share of the ties at it."""
        zeros = sum(int(keys.size - np.count_nonzero(keys)) for keys in self.keys(group))
        wanted = target_count(sparsity, sum(tensor.size for tensor in group), zeros)
        if wanted == 0:
            return 0, {tensor.name: 0 for tensor in group}
        key = kth_smallest(lambda: self.keys(group), wanted, wide=self.wide)
        below, equal = 0, dict[str, int]()
        for tensor in group:
            equal[tensor.name] = 0
            for keys in self.keys([tensor]):
                below += int(np.count_nonzero(keys < keys.dtype.type(key)))
                equal[tensor.name] += int(np.count_nonzero(keys == keys.dtype.type(key)))
        shares: dict[str, int] = {}
        for tensor in group:  # by name: the result does not depend on the sharding
            shares[tensor.name] = min(equal[tensor.name], wanted - below)
            below += shares[tensor.name]
        return key, shares


def _band(units: _Units) -> Band:
    band, widest = find_band(lambda: units.keys(units.tensors), wide=units.wide)
    if band is None:
        seen = "no empty band with 1 % of the weights below it"
        if widest is not None:
            seen = (
                f"the widest empty band is {widest.decades:.2f} decades ({widest.low:.3g} to "
                f"{widest.high:.3g})"
            )
        what = (
            f"{units.source.name}: no band of 2 decades among {sum(t.size for t in units.tensors)} "
            f"weights: {seen}"
        )
        raise VerdictError(
            101, what, mend="fine-tune with p < 1 first (or for more steps), or give --sparsity or --below"
        )
    return band
