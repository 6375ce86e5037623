"""The empty band of |w| that L_p decay with p < 1 leaves between dead and living weights, found in the files.

For p < 1 no stable weight lives in 0 < |w| < w_gap (math: arXiv 2404.10824, fixed points). A band counts
when it is at least two decades wide with at least 1 % of the prunable weights below it; the widest such band
is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log10, sqrt

import numpy as np

from lpsparse.checkpoint.dtypes import Bits, magnitudes, value_of
from lpsparse.parallel.threads import parallel
from lpsparse.pruning.select import Counts, Scored, Task, tasks_of

MIN_DECADES = 2.0
MIN_BELOW = 0.01
ZERO = 1e-30  # decay writes magnitudes below this as +0, so an exact zero counts as lying here
_BINS = 1 << 16


@dataclass(frozen=True, slots=True)
class Band:
    low: float  # largest magnitude below the band; 0 when only exact zeros are below
    high: float  # smallest magnitude above it
    below: int  # weights under it
    total: int

    @property
    def decades(self) -> float:
        return log10(self.high / max(self.low, ZERO)) if self.high > 0 else 0.0

    @property
    def threshold(self) -> float:
        """Where to cut: the middle of the band on a logarithmic scale."""
        return sqrt(max(self.low, ZERO)) * sqrt(self.high)


def find_band(group: list[Scored], *, wide: bool) -> tuple[Band | None, Band | None]:
    """The widest band that counts, and the widest one that is too narrow (for the message). Two passes.

    Bins are the upper 16 bits of a key (about 0.4 % wide in f32), so candidates are runs of empty bins; the
    second pass takes the exact magnitudes at both edges of every candidate.
    """
    shift = 48 if wide else 16
    tasks = tasks_of(group)
    counts = sum(parallel(lambda task: _count(task, shift, wide), tasks), np.zeros(_BINS, np.int64))
    used = np.flatnonzero(counts)
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    runs = [(int(a), int(b)) for a, b in pairwise(used)]
    runs = [(a, b) for a, b in runs if cumulative[a] >= MIN_BELOW * total]
    if not runs:
        return None, None
    runs = sorted(runs, key=lambda run: -_width(*run, shift, wide))[:8]
    ends = parallel(lambda task: _ends(task, {bin for run in runs for bin in run}, shift, wide), tasks)
    bands = [
        Band(
            value_of(max(each[a][1] for each in ends if a in each), wide=wide),
            value_of(min(each[b][0] for each in ends if b in each), wide=wide),
            int(cumulative[a]),
            total,
        )
        for a, b in runs
    ]
    # Between zeros and the smallest weight there is room without end, and nothing to cut: it counts only when
    # no band lies between two weights.
    best = max(bands, key=lambda band: (band.low > 0 and band.decades >= MIN_DECADES, band.decades))
    return (best, None) if best.decades >= MIN_DECADES else (None, best)


def _keys(task: Task, wide: bool) -> Iterator[Bits]:
    scored, first, last = task
    for codes in scored.blocks(first, last):
        yield magnitudes(codes.ravel(), scored.dtype, wide=wide)


def _count(task: Task, shift: int, wide: bool) -> Counts:
    counts = np.zeros(_BINS, np.int64)
    for keys in _keys(task, wide):
        counts += np.bincount((keys >> keys.dtype.type(shift)).astype(np.int64), minlength=_BINS)
    return counts


def _ends(task: Task, bins: set[int], shift: int, wide: bool) -> dict[int, tuple[int, int]]:
    """The smallest and the largest key in each of these bins that is not empty."""
    ends: dict[int, tuple[int, int]] = {}
    for keys in _keys(task, wide):
        places = keys >> keys.dtype.type(shift)
        for each in bins:
            inside = keys[places == each]
            if inside.size:
                low, high = ends.get(each, (int(inside[0]), int(inside[0])))
                ends[each] = min(low, int(inside.min())), max(high, int(inside.max()))
    return ends


def _width(a: int, b: int, shift: int, wide: bool) -> float:
    """Decades of a run of empty bins, at most one bin off at each side."""
    low = max(value_of(a << shift, wide=wide), ZERO)
    return log10(max(value_of(b << shift, wide=wide), ZERO) / low)
