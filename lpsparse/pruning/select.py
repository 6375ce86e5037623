"""Exact selection by score over any number of weights, in constant memory, on all cores.

A sample says roughly where the threshold lies. One pass counts exactly what lies below that bracket and, in
bins, what lies inside it; the bracket becomes the bin with the threshold, until that is a single score. Where
the sample misled, the bracket moves. The sample decides how many passes there are, never the result.

Scores travel as the ordered integers of `checkpoint.dtypes`, in their own width; brackets are magnitude keys,
which compare across dtypes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import DTYPES, F32_INF, F64_INF, Bits, code_of, magnitudes
from lpsparse.parallel.progress import advance, phase
from lpsparse.parallel.threads import parallel

Counts = NDArray[np.int64]

_BITS = 12  # 4,096 bins a pass, or fewer where there are many tensors: each has its own
_HELD = 1 << 22  # bins of all tensors together
_SAMPLE = 1 << 20  # scores
_SPREAD = 0.002  # of all scores, on either side of the sample's quantile: 5 standard deviations
_WIDER = 16  # times the spread, where the sample misled
_FEW = 6  # scores in a bracket that are counted one by one, which is faster than taking them out
_RUN = 4096  # neighbouring scores that the sample takes together
_TASK = 1 << 24  # scores that a thread counts at a time


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one tensor. `blocks(first, last)` gives those of rows first..last, of any shape."""

    name: str
    dtype: str  # of the scores
    rows: int
    columns: int
    blocks: Callable[[int, int], Iterator[Bits]]

    @property
    def size(self) -> int:
        return self.rows * self.columns


Task = tuple[Scored, int, int]  # rows first..last of a tensor


@dataclass(frozen=True, slots=True)
class Selected:
    """The cut: all scores below a key, and in each tensor the first few that equal it."""

    key: int
    ties: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Tally:
    zeros: int
    below: int  # the bracket
    places: Counts  # bins that are not empty
    counts: Counts  # what they hold


def target_count(sparsity: Decimal, size: int, zeros: int) -> int:
    """How many weights must be zero: max(floor(S * N), zeros already there), S read as a decimal."""
    return max(floor(sparsity * size), zeros)


def select(group: list[Scored], sparsity: Decimal, *, wide: bool) -> Selected:
    """The smallest scores of a group, as many as `target_count` says; ties go by the group's order, then by
    position."""
    size = sum(scored.size for scored in group)
    sample = np.concatenate(parallel(lambda scored: _sample(scored, size, wide), group))
    rank, spread = float(sparsity) * sample.size, _SPREAD * sample.size + 8
    low, high = _bracket(sample, rank, spread, wide)
    tasks = tasks_of(group)
    bits = min(_BITS, max(4, (_HELD // len(tasks)).bit_length() - 1))
    while True:
        shift = max(0, (high - low - 1).bit_length() - bits)
        tallies = _pass(group, tasks, (low, high, shift), wide)
        zeros = {name: sum(tally.zeros for tally in of) for name, of in tallies.items()}
        wanted = target_count(sparsity, size, sum(zeros.values()))
        if wanted == sum(zeros.values()):  # nothing more to cut; -0 becomes +0
            return Selected(0, zeros)
        below = sum(tally.below for of in tallies.values() for tally in of)
        bins = _bins(tally for of in tallies.values() for tally in of)
        if wanted <= below:
            spread *= _WIDER
            low, high = min(low - 1, _bracket(sample, rank, spread, wide)[0]), low
        elif wanted > below + bins.sum():
            spread *= _WIDER
            low, high = high, max(high + 1, _bracket(sample, rank, spread, wide)[1])
        else:
            place = int(np.searchsorted(np.cumsum(bins), wanted - below))
            left = wanted - below - int(bins[:place].sum())
            low, high = low + (place << shift), min(high, low + ((place + 1) << shift))
            score = _only_score(group, low, high, wide)
            if score is not None:
                return Selected(score, _shares(tallies, place, left))


def _only_score(group: list[Scored], low: int, high: int, wide: bool) -> int | None:
    """The one score that is possible from `low` to below `high`; None where there are others. Dtypes of few
    bits have scores that lie far apart: another pass would tell nothing new."""
    if high - low == 1:
        return low
    found: set[int] = set()
    for dtype in {scored.dtype for scored in group}:
        first, end = (code_of(key, dtype, wide=wide) for key in (low, high))
        if end - first > 1:
            return None
        codes = np.arange(first, end).astype(DTYPES[dtype].storage)
        found |= {int(key) for key in magnitudes(codes, dtype, wide=wide)}
    return found.pop() if len(found) == 1 else None


def _top(wide: bool) -> int:
    """The key above every score; a sum of finite ones may be infinite."""
    return (F64_INF if wide else F32_INF) + 1


def _shares(tallies: dict[str, list[_Tally]], place: int, left: int) -> dict[str, int]:
    """How many of the scores in the bin at `place` are cut of each tensor."""
    shares: dict[str, int] = {}
    for name, of in tallies.items():
        shares[name] = min(left, int(_bins(of)[place]))
        left -= shares[name]
    return shares


def _bins(tallies: Iterable[_Tally]) -> Counts:
    total = np.zeros(1 << _BITS, np.int64)
    for tally in tallies:
        total[tally.places] += tally.counts
    return total


def tasks_of(group: list[Scored]) -> list[Task]:
    """Rows first..last of a tensor, as many as a thread counts at a time."""
    tasks: list[Task] = []
    for scored in group:
        step = max(1, _TASK // max(scored.columns, 1))
        tasks += [(scored, row, min(row + step, scored.rows)) for row in range(0, scored.rows, step)]
    return tasks


def _pass(
    group: list[Scored], tasks: list[Task], bracket: tuple[int, int, int], wide: bool
) -> dict[str, list[_Tally]]:
    def counted(task: Task) -> _Tally:
        return _tally(*task, bracket, wide)

    with phase("selecting", sum(scored.size * DTYPES[scored.dtype].bits // 8 for scored in group)):
        found = parallel(counted, tasks)
    tallies: dict[str, list[_Tally]] = {scored.name: [] for scored in group}
    for (scored, _, _), tally in zip(tasks, found, strict=True):
        tallies[scored.name].append(tally)
    return tallies


def _tally(scored: Scored, first: int, last: int, bracket: tuple[int, int, int], wide: bool) -> _Tally:
    low, high, shift = bracket
    begin, end = (code_of(key, scored.dtype, wide=wide) for key in (low, high))
    bins = np.zeros(1 << _BITS, np.int64)
    zeros = below = 0
    for codes in scored.blocks(first, last):
        kind = codes.dtype.type
        advance(codes.nbytes)
        zeros += codes.size - int(np.count_nonzero(codes))
        if end - begin <= _FEW:
            edges = np.arange(begin, end + 1).astype(codes.dtype)
            under = [int(np.count_nonzero(codes < edge)) for edge in edges]
            inside, each = edges[:-1], np.diff(under)
        else:  # what is below the bracket wraps round to a large number
            under = [int(np.count_nonzero(codes < kind(begin)))]
            inside = codes[(codes - kind(begin)) < kind(end - begin)]
            each = np.ones(inside.size, np.int64)
        below += under[0]
        if inside.size:
            keys = magnitudes(inside, scored.dtype, wide=wide)
            offsets = (keys - keys.dtype.type(low)) >> keys.dtype.type(shift)
            bins += np.bincount(offsets.astype(np.int64), each, bins.size).astype(np.int64)
    places = np.flatnonzero(bins).astype(np.int64)
    return _Tally(zeros, below, places, bins[places])


def _bracket(sample: Bits, rank: float, spread: float, wide: bool) -> tuple[int, int]:
    """Two keys between which the score of that rank is likely to lie."""
    first, last = floor(rank - spread), ceil(rank + spread)
    sample.partition([place for place in (first, last) if 0 <= place < sample.size] or [0])
    low = int(sample[first]) if first >= 0 else 0
    return low, int(sample[last]) + 1 if last < sample.size else _top(wide)


def _sample(scored: Scored, size: int, wide: bool) -> Bits:
    """Keys of this tensor's share of the sample, from runs of rows spread over it."""
    wanted = min(scored.size, ceil(_SAMPLE * scored.size / size))
    run = max(1, _RUN // scored.columns)  # rows
    runs = min(ceil(wanted / (run * scored.columns)), ceil(scored.rows / run))
    each = ceil(wanted / runs)
    found: list[Bits] = []
    for k in range(runs):
        row = k * scored.rows // runs
        codes = np.concatenate([c.ravel() for c in scored.blocks(row, min(row + run, scored.rows))])
        found.append(magnitudes(codes[:: max(1, codes.size // each)], scored.dtype, wide=wide))
    return np.concatenate(found)
