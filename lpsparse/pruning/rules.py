"""Rules say how much is cut: a sparsity, a threshold, the gap, N:M. `decide` reads and returns plain data;
`apply` cuts blocks by it and decides nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal, Protocol

import numpy as np

from lpsparse.checkpoint.dtypes import Bits, code_of, key_of, ordered, value_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.errors import VerdictError
from lpsparse.families import CRITERIA
from lpsparse.parallel.progress import phase
from lpsparse.parallel.threads import parallel
from lpsparse.pruning.criteria.base import Criterion
from lpsparse.pruning.cuts import (
    Pair,
    cut_blocks,
    cut_n_m,
    cut_rows,
    cut_smallest,
    grain_of,
    joined,
    sums_of_blocks,
    table_of,
)
from lpsparse.pruning.gap import Band, find_band
from lpsparse.pruning.scores import (
    check_all_finite,
    check_divides,
    cut_each,
    finite_codes,
    is_wide,
    scored_of,
)
from lpsparse.pruning.select import Scored, Selected, select, target_count

Scope = Literal["global", "tensor"]


@dataclass(frozen=True, slots=True)
class Cutoff:
    """The score below which a tensor, or a row, is cut."""

    key: int  # of `magnitudes`
    ties: int = 0  # how many scores that equal it are cut, by position


@dataclass(frozen=True, slots=True)
class Decided:
    """What a rule decided, as plain data."""

    wide: bool = False  # keys are those of float64
    cutoffs: dict[str, Cutoff] | None = None  # by tensor; None: each block decides for itself
    of_rows: dict[str, tuple[Cutoff, ...]] | None = None  # by tensor, of rows that are read in pieces
    threshold: float | None = None  # the one magnitude of a global cut
    band: Band | None = None  # what --gap found


class Rule(Protocol):
    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        """Read the prunable tensors, in the order of their names. Raises InputError on NaN or Inf, UsageError
        on shapes that the rule does not divide, VerdictError if there is no gap."""
        ...

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        """The fewest zeros of all these tensors and of each, by names and shapes alone. None: values decide.
        Raises UsageError as `decide` does."""
        ...

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        """The same blocks with zeros."""
        ...


class Asked(Protocol):
    """The settings of a step that choose a rule."""

    @property
    def sparsity(self) -> Decimal | None: ...
    @property
    def below(self) -> float | None: ...
    @property
    def gap(self) -> bool: ...
    @property
    def n_m(self) -> str | None: ...
    @property
    def block(self) -> str | None: ...
    @property
    def scope(self) -> Literal["global", "tensor", "row"]: ...
    @property
    def criterion(self) -> str: ...


def rule_of(step: Asked) -> Rule:
    """The rule that a step asks for."""
    criterion: Criterion = CRITERIA[step.criterion]
    if step.gap:
        return Gap()
    if step.below is not None:
        return Below(step.below)
    if step.n_m is not None:
        return NofM(_pair(step.n_m), criterion)
    assert step.sparsity is not None
    if step.scope == "row":
        return RowSparsity(step.sparsity, criterion)
    if step.block is not None:
        return BlockSparsity(step.sparsity, step.scope, criterion, _pair(step.block))
    return Sparsity(step.sparsity, step.scope, criterion)


def _pair(text: str) -> Pair:
    """2:4, or 16x16."""
    first, second = text.replace("x", ":").split(":")
    return int(first), int(second)


@dataclass(frozen=True, slots=True)
class Below:
    """Cut every |w| below a threshold."""

    threshold: float

    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        check_all_finite(source, tensors)
        return _at(self.threshold, tensors, None)

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        return None, dict.fromkeys((tensor.name for tensor in tensors), None)

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        return _cut_below(tensor, decided, blocks, CRITERIA["magnitude"])


@dataclass(frozen=True, slots=True)
class Gap:
    """Cut inside the empty band that L_p decay leaves."""

    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        magnitude = CRITERIA["magnitude"]
        scored = [scored_of(source, tensor, magnitude) for tensor in tensors]
        band, widest = find_band(scored, wide=is_wide(tensors, magnitude))
        if band is None:
            seen = "no empty band has 1 % of the weights below it"
            if widest is not None:
                ends = f"({widest.low:.3g} to {widest.high:.3g})"
                seen = f"the widest empty band has {widest.decades:.2f} decades {ends}"
            count = sum(tensor.size for tensor in tensors)
            what = f"{source.name}: expected an empty band of 2 decades among {count} weights: {seen}"
            hint = "fine-tune with p < 1 first (or for more steps), or give --sparsity or --below"
            raise VerdictError(101, what, hint=hint)
        return _at(band.threshold, tensors, band)

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        return None, dict.fromkeys((tensor.name for tensor in tensors), None)

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        return _cut_below(tensor, decided, blocks, CRITERIA["magnitude"])


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Cut the lowest scores of all tensors, or of each, to exactly this sparsity."""

    share: Decimal
    scope: Scope
    criterion: Criterion

    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        wide = is_wide(tensors, self.criterion)
        scored = [scored_of(source, tensor, self.criterion) for tensor in tensors]
        found = _selected(scored, self.share, self.scope, wide, tensors)
        one = value_of(found[0].key, wide=wide) if self.scope == "global" else None
        return Decided(wide, _cutoffs(found), threshold=one)

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        return _expected(tensors, self.share, self.scope, 1)

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        return _cut_below(tensor, decided, blocks, self.criterion)


@dataclass(frozen=True, slots=True)
class BlockSparsity:
    """Cut the blocks with the lowest sums of scores, to exactly this share of the blocks."""

    share: Decimal
    scope: Scope
    criterion: Criterion
    block: Pair

    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        check_divides("--block", tensors, *self.block)
        scored = [self._scored(source, tensor) for tensor in tensors]
        found = _selected(scored, self.share, self.scope, True, tensors)
        return Decided(True, _cutoffs(found))

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        check_divides("--block", tensors, *self.block)
        return _expected(tensors, self.share, self.scope, self.block[0] * self.block[1])

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        assert decided.cutoffs is not None
        cutoff, width = decided.cutoffs[tensor.name], table_of(tensor)[1]
        ties = cutoff.ties

        def cut(block: Bits, scores: Bits) -> None:
            nonlocal ties
            sums = sums_of_blocks(scores, self.criterion.dtype(tensor), width, self.block)
            kept = np.ones_like(sums)
            ties -= cut_smallest(kept, sums, cutoff.key, ties)
            cut_blocks(block.reshape(-1, width), kept != 0, *self.block)

        return cut_each(tensor, blocks, self.criterion, cut, grain_of(tensor, None, self.block))

    def _scored(self, source: Checkpoint, tensor: Tensor) -> Scored:
        grain, width = grain_of(tensor, None, self.block), table_of(tensor)[1]

        def sums(first: int, last: int) -> Iterator[Bits]:
            for line, raw in joined(tensor.blocks(first * grain, last * grain), grain):
                scores = self.criterion.score(finite_codes(source, tensor, raw), tensor, line)
                yield sums_of_blocks(scores, self.criterion.dtype(tensor), width, self.block)

        high = tensor.grid[0] // grain
        wide = tensor.size // (self.block[0] * self.block[1]) // high
        return Scored(tensor.name, "F64", high, wide, sums)


@dataclass(frozen=True, slots=True)
class RowSparsity:
    """Cut the lowest scores of each row, to exactly this sparsity in every row."""

    share: Decimal
    criterion: Criterion

    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        check_all_finite(source, tensors)
        wide = is_wide(tensors, self.criterion)
        return Decided(wide, of_rows={t.name: self._long_rows(source, t, wide) for t in tensors})

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        return _expected(tensors, self.share, "row", 1)

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        assert decided.of_rows is not None
        rows = decided.of_rows[tensor.name]
        if rows:
            return self._cut_pieces(tensor, rows, decided.wide, blocks)
        return cut_each(tensor, blocks, self.criterion, lambda cut, scores: cut_rows(cut, scores, self.share))

    def _long_rows(self, source: Checkpoint, tensor: Tensor, wide: bool) -> tuple[Cutoff, ...]:
        """The cutoff of each row that is read in pieces; none if each is read at once."""
        scored = scored_of(source, tensor, self.criterion)
        pieces = scored.rows // max(tensor.rows, 1)
        if pieces < 2:
            return ()

        def row(number: int) -> Scored:
            start = number * pieces
            return replace(scored, rows=pieces, blocks=lambda a, b: scored.blocks(start + a, start + b))

        found = (select([row(number)], self.share, wide=wide) for number in range(tensor.rows))
        return tuple(Cutoff(each.key, each.ties[tensor.name]) for each in found)

    def _cut_pieces(self, tensor: Tensor, rows: tuple[Cutoff, ...], wide: bool, blocks: Blocks) -> Blocks:
        pieces, ties = tensor.grid[0] // tensor.rows, 0
        for line, block in blocks:
            cut = block.copy()
            scores = self.criterion.score(ordered(block, tensor.dtype), tensor, line)
            for number, (piece, each) in enumerate(zip(cut, scores, strict=True), line):
                cutoff = rows[number // pieces]
                ties = cutoff.ties if number % pieces == 0 else ties
                low = code_of(cutoff.key, self.criterion.dtype(tensor), wide=wide)
                ties -= cut_smallest(piece, each, low, ties)
            del scores, block
            yield line, cut


@dataclass(frozen=True, slots=True)
class NofM:
    """Leave at most N non-zeros, the highest scores, in each M neighbours of a row."""

    n_m: Pair
    criterion: Criterion

    def decide(self, source: Checkpoint, tensors: list[Tensor]) -> Decided:
        check_divides("--n-m", tensors, 1, self.n_m[1])
        check_all_finite(source, tensors)
        return Decided()

    def expect(self, tensors: list[Tensor]) -> tuple[int | None, dict[str, int | None]]:
        n, m = self.n_m
        check_divides("--n-m", tensors, 1, m)
        zeros = {tensor.name: tensor.size // m * (m - n) for tensor in tensors}
        return sum(zeros.values()), {**zeros}

    def apply(self, tensor: Tensor, decided: Decided, blocks: Blocks) -> Blocks:
        grain = grain_of(tensor, self.n_m, None)
        return cut_each(
            tensor, blocks, self.criterion, lambda cut, scores: cut_n_m(cut, scores, *self.n_m), grain
        )


def _cut_below(tensor: Tensor, decided: Decided, blocks: Blocks, criterion: Criterion) -> Blocks:
    assert decided.cutoffs is not None
    cutoff = decided.cutoffs[tensor.name]
    low, ties = code_of(cutoff.key, criterion.dtype(tensor), wide=decided.wide), cutoff.ties

    def cut(block: Bits, scores: Bits) -> None:
        nonlocal ties
        ties -= cut_smallest(block, scores, low, ties)

    return cut_each(tensor, blocks, criterion, cut)


def _at(threshold: float, tensors: list[Tensor], band: Band | None) -> Decided:
    wide = is_wide(tensors, CRITERIA["magnitude"])
    key = key_of(threshold, wide=wide)
    return Decided(wide, {tensor.name: Cutoff(key) for tensor in tensors}, threshold=threshold, band=band)


def _selected(
    scored: list[Scored], share: Decimal, scope: Scope, wide: bool, tensors: list[Tensor]
) -> list[Selected]:
    if scope == "global":  # its passes are shared among ranks, else the tensors are
        return [select(scored, share, wide=wide)]
    with phase("selecting", sum(tensor.nbytes for tensor in tensors)):
        return parallel(lambda each: select([each], share, wide=wide), scored)


def _cutoffs(selected: list[Selected]) -> dict[str, Cutoff]:
    return {name: Cutoff(each.key, ties) for each in selected for name, ties in each.ties.items()}


def _expected(
    tensors: list[Tensor], share: Decimal, scope: str, grain: int
) -> tuple[int | None, dict[str, int | None]]:
    """Zeros that a sparsity leaves in units of `grain` weights."""
    if scope == "global":
        zeros = target_count(share, sum(tensor.size // grain for tensor in tensors), 0) * grain
        return zeros, dict.fromkeys((tensor.name for tensor in tensors), None)
    units = {tensor.name: tensor.rows if scope == "row" else 1 for tensor in tensors}  # each meets the share
    each = {
        tensor.name: target_count(share, tensor.size // grain // units[tensor.name], 0)
        * grain
        * units[tensor.name]
        for tensor in tensors
    }
    return sum(each.values()), {**each}
