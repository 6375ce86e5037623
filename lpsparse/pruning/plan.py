"""Decide what to cut, as plain data: one threshold and a share of its ties for each tensor, or a pattern.
Writes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

import numpy as np

from lpsparse.checkpoint.counting import Cut, check_finite, nonfinite
from lpsparse.checkpoint.dtypes import Bits, code_of, key_of, ordered, value_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.errors import UsageError, VerdictError
from lpsparse.parallel.progress import phase
from lpsparse.parallel.threads import parallel
from lpsparse.pruning.gap import Band, find_band
from lpsparse.pruning.neighbours import Pair, divides, grain_of, joined, sums_of_blocks, table_of
from lpsparse.pruning.select import Scored, cut_blocks, cut_n_m, cut_rows, cut_smallest, select, target_count
from lpsparse.pruning.targets import Chosen, Decision, choose

Scope = Literal["global", "tensor", "row"]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor."""

    decision: Decision
    threshold: int = 0  # magnitude key: below it is cut
    ties: int = 0  # how many that equal it are cut, first positions first
    row_sparsity: Decimal | None = None  # cut this much of each row instead
    long_rows: tuple[tuple[int, int], ...] = ()  # threshold and ties of each row that is read in pieces
    n_m: Pair | None = None  # leave n of each m neighbours instead
    block: Pair | None = None  # what is cut are blocks of rows x columns, by the key of their sum


@dataclass(frozen=True, slots=True)
class Plan:
    tensors: dict[str, TensorPlan]
    wide: bool  # keys are those of float64
    threshold: float | None  # the one magnitude of a global cut
    band: Band | None  # what --gap found

    def cut(self, tensor: Tensor) -> Cut | None:
        """The function that applies this plan to the blocks of a tensor; None where nothing is cut."""
        plan = self.tensors[tensor.name]
        if not plan.decision.prunable:
            return None
        scores = tensor.dtype if plan.block is None else "F64"
        low = code_of(plan.threshold, scores, wide=self.wide)
        if plan.long_rows:
            return lambda blocks: self._cut_long_rows(tensor, blocks)

        def apply(blocks: Blocks) -> Blocks:
            ties = plan.ties
            for line, block in joined(blocks, grain_of(tensor, plan.n_m, plan.block)):
                codes, cut = ordered(block, tensor.dtype), block.copy()
                if plan.row_sparsity is not None:
                    cut_rows(cut, codes, plan.row_sparsity)
                elif plan.n_m is not None:
                    cut_n_m(cut, codes, *plan.n_m)
                elif plan.block is not None:
                    sums = sums_of_blocks(block, tensor, plan.block)
                    kept = np.ones_like(sums)
                    ties -= cut_smallest(kept, sums, low, ties)
                    cut_blocks(cut.reshape(-1, table_of(tensor)[1]), kept != 0, *plan.block)
                else:
                    ties -= cut_smallest(cut, codes, low, ties)
                del codes, block  # each thread would hold them while it writes
                yield line, cut

        return apply

    def _cut_long_rows(self, tensor: Tensor, blocks: Blocks) -> Blocks:
        rows, pieces = self.tensors[tensor.name].long_rows, tensor.grid[0] // tensor.rows
        ties = 0
        for line, block in blocks:
            cut = block.copy()
            for number, piece in enumerate(cut, line):
                threshold, given = rows[number // pieces]
                ties = given if number % pieces == 0 else ties
                low = code_of(threshold, tensor.dtype, wide=self.wide)
                ties -= cut_smallest(piece, ordered(piece, tensor.dtype), low, ties)
            yield line, cut


def plan_prune(
    source: Checkpoint,
    *,
    sparsity: Decimal | None = None,
    below: float | None = None,
    gap: bool = False,
    n_m: Pair | None = None,
    block: Pair | None = None,
    scope: Scope = "global",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    look: bool = False,
) -> Plan:
    """Exactly one of `sparsity` (met exactly within each scope), `below`, `gap` and `n_m` decides. With
    `block` it is blocks of rows x columns that are counted, and ranked by the sum of their magnitudes.

    Ties go by tensor name, then position. Raises InputError on NaN or Inf in a prunable tensor, UsageError
    on patterns that match nothing and on shapes that n_m or block do not divide, VerdictError when `gap`
    finds no band.
    """
    chosen = choose(source, include, exclude, always_look=look)
    tensors = sorted((t for t in source.tensors if chosen[t.name].prunable), key=lambda tensor: tensor.name)
    wide = block is not None or any(tensor.dtype == "F64" for tensor in tensors)
    plans = {name: TensorPlan(decision, block=block) for name, decision in chosen.items()}
    threshold, band = None, None
    if n_m is not None:
        _check_divides("--n-m", tensors, 1, n_m[1])
    if block is not None:
        _check_divides("--block", tensors, *block)
    if gap:
        band = _band(source, tensors, wide)
        threshold = band.threshold
    elif sparsity is None or scope == "row":
        parallel(lambda tensor: _check(source, tensor), tensors)
        threshold = below
    if threshold is not None:
        key = key_of(threshold, wide=wide)
        plans |= {t.name: replace(plans[t.name], threshold=key) for t in tensors}
    elif n_m is not None:
        plans |= {t.name: replace(plans[t.name], n_m=n_m) for t in tensors}
    elif scope == "row":
        assert sparsity is not None
        for tensor in tensors:
            long = _long_rows(source, tensor, sparsity, wide)
            plans[tensor.name] = replace(plans[tensor.name], row_sparsity=sparsity, long_rows=long)
    else:
        assert sparsity is not None
        scored = [_scored(source, tensor, block) for tensor in tensors]
        if scope == "global":  # its passes are shared among processes, else the tensors are
            selected = [select(scored, sparsity, wide=wide)]
        else:
            with phase("selecting", sum(tensor.nbytes for tensor in tensors)):
                selected = parallel(lambda each: select([each], sparsity, wide=wide), scored)
        for found in selected:
            for name, ties in found.ties.items():
                plans[name] = replace(plans[name], threshold=found.key, ties=ties)
        if scope == "global" and block is None:
            threshold = value_of(selected[0].key, wide=wide)
    return Plan(plans, wide, threshold, band)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a plan will be, as far as names and shapes tell. Zeros are the fewest that the cut leaves: where
    more are there already, they stay. None is what the values decide."""

    chosen: Chosen
    zeros: int | None  # of all prunable weights
    each: dict[str, int | None]  # of each prunable tensor


def plan_unread(
    source: Checkpoint,
    *,
    sparsity: Decimal | None,
    n_m: Pair | None,
    block: Pair | None,
    scope: Scope,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    look: bool = False,
) -> Outlook:
    """`plan_prune` without reading a weight; refuses what that would refuse of names and shapes."""
    chosen = choose(source, include, exclude, always_look=look)
    tensors = [tensor for tensor in source.tensors if chosen[tensor.name].prunable]
    each: dict[str, int | None] = dict.fromkeys((tensor.name for tensor in tensors), None)
    if n_m is not None:
        _check_divides("--n-m", tensors, 1, n_m[1])
        each = {t.name: t.size // n_m[1] * (n_m[1] - n_m[0]) for t in tensors}
    if block is not None:
        _check_divides("--block", tensors, *block)
    if sparsity is None:
        return Outlook(chosen, sum(known for known in each.values() if known) if n_m else None, each)
    grain = block[0] * block[1] if block else 1
    if scope == "global":
        return Outlook(chosen, target_count(sparsity, sum(t.size // grain for t in tensors), 0) * grain, each)
    units = {t.name: t.rows if scope == "row" else 1 for t in tensors}  # each of them meets the sparsity
    each = {
        t.name: target_count(sparsity, t.size // grain // units[t.name], 0) * grain * units[t.name]
        for t in tensors
    }
    return Outlook(chosen, sum(known for known in each.values() if known), each)


def _check_divides(flag: str, tensors: list[Tensor], rows: int, columns: int) -> None:
    """Raises UsageError for tensors that do not consist of such blocks."""
    odd = [tensor for tensor in tensors if not divides(tensor, rows, columns)]
    if odd:
        high, wide = table_of(odd[0])
        what = f"{flag}: {odd[0].name!r}: {high} rows of {wide} are not made of {rows} x {columns}"
        others = f"; nor are {', '.join(tensor.name for tensor in odd[1:9])}" if len(odd) > 1 else ""
        more = f" and {len(odd) - 9} more" if len(odd) > 9 else ""
        hint = "--exclude them (it takes globs), or choose other numbers"
        raise UsageError(215, what + others + more, hint=hint)


def _scored(source: Checkpoint, tensor: Tensor, block: Pair | None) -> Scored:
    """The magnitudes of a tensor, or the sums of its blocks."""

    def codes(first: int, last: int) -> Iterator[Bits]:
        for _, raw in tensor.blocks(first, last):
            yield _finite_codes(source, tensor, raw)

    if block is None:
        return Scored(tensor.name, tensor.dtype, *tensor.grid, codes)
    grain = grain_of(tensor, None, block)

    def sums(first: int, last: int) -> Iterator[Bits]:
        for _, raw in joined(tensor.blocks(first * grain, last * grain), grain):
            _finite_codes(source, tensor, raw)
            yield sums_of_blocks(raw, tensor, block)

    high = tensor.grid[0] // grain
    return Scored(tensor.name, "F64", high, tensor.size // (block[0] * block[1]) // high, sums)


def _long_rows(
    source: Checkpoint, tensor: Tensor, sparsity: Decimal, wide: bool
) -> tuple[tuple[int, int], ...]:
    """Threshold and ties of each row, where rows are read in pieces; nothing where they are read whole."""
    whole = _scored(source, tensor, None)
    pieces = whole.rows // max(tensor.rows, 1)
    if pieces < 2:
        return ()

    def row(number: int) -> Scored:
        start = number * pieces
        return replace(whole, rows=pieces, blocks=lambda a, b: whole.blocks(start + a, start + b))

    found = (select([row(number)], sparsity, wide=wide) for number in range(tensor.rows))
    return tuple((each.key, each.ties[tensor.name]) for each in found)


def _finite_codes(source: Checkpoint, tensor: Tensor, raw: Bits) -> Bits:
    codes = ordered(raw, tensor.dtype)
    check_finite(source, tensor, nonfinite(codes, tensor.dtype))
    return codes


def _check(source: Checkpoint, tensor: Tensor) -> None:
    for _, raw in tensor.blocks():
        _finite_codes(source, tensor, raw)


def _band(source: Checkpoint, tensors: list[Tensor], wide: bool) -> Band:
    band, widest = find_band([_scored(source, tensor, None) for tensor in tensors], wide=wide)
    if band is None:
        seen = "no empty band with 1 % of the weights below it"
        if widest is not None:
            seen = (
                f"the widest empty band is {widest.decades:.2f} decades ({widest.low:.3g} to "
                f"{widest.high:.3g})"
            )
        what = f"{source.name}: no band of 2 decades among {sum(t.size for t in tensors)} weights: {seen}"
        raise VerdictError(
            101, what, hint="fine-tune with p < 1 first (or for more steps), or give --sparsity or --below"
        )
    return band
