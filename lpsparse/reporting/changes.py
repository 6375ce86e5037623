"""Compare a checkpoint with its BASE, value by value: what was cut, at which magnitude, what was revived, and
what changed most."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import DTYPES, Bits, magnitudes, ordered
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Tensor
from lpsparse.parallel.progress import advance, phase
from lpsparse.reporting.records import Change
from lpsparse.reporting.survey import on_each

_TASK_BYTES = 32 << 20


@dataclass(slots=True)
class _Sums:
    cut: int = 0
    revived: int = 0
    changed: int = 0
    largest_cut: float = -1.0  # -1: nothing was
    smallest_kept: float = math.inf
    largest_change: float = 0.0
    at: int = -1
    before: float = 0.0
    after: float = 0.0
    moved: float = 0.0  # sum of squared changes
    square: float = 0.0  # and of BASE's squares


def changes(checkpoint: Checkpoint, base: Checkpoint, names: Mapping[str, str]) -> dict[str, Change]:
    """The change of each tensor of floats that both have in the same shape, by our name. `names` maps BASE's
    names to ours. If dtypes differ, values are compared."""
    theirs = {names[tensor.name]: tensor for tensor in base.tensors if tensor.name in names}
    pairs = [(tensor, theirs[tensor.name]) for tensor in checkpoint.tensors if tensor.name in theirs]
    pairs = [(ours, other) for ours, other in pairs if _alike(ours, other)]
    tasks = [(ours, other, *lines) for ours, other in pairs for lines in _tasks(ours, other)]
    found = {ours.name: _Sums() for ours, _ in pairs}
    with phase("comparing", sum(ours.nbytes for ours, _ in pairs)):
        for (ours, *_), part in on_each(_compare, tasks):
            _add(found[ours.name], part)
    return {name: _change(sums) for name, sums in found.items()}


def _alike(ours: Tensor, other: Tensor) -> bool:
    floats = DTYPES[ours.dtype].is_float and DTYPES[other.dtype].is_float
    return ours.shape == other.shape and floats and ours.size > 0


def _tasks(ours: Tensor, other: Tensor) -> list[tuple[int, int]]:
    """Ranges of values that are complete lines in both."""
    wide = math.lcm(ours.grid[1], other.grid[1])  # it divides a row
    lines = ours.size // wide
    step = max(1, _TASK_BYTES // max(wide * DTYPES[ours.dtype].storage.itemsize, 1))
    return [(line * wide, min(line + step, lines) * wide) for line in range(0, lines, step)]


def _compare(task: tuple[Tensor, Tensor, int, int]) -> _Sums:
    ours, other, first, last = task
    found, place = _Sums(), first
    for mine, base in _side_by_side(ours, other, first, last):
        advance(mine.nbytes)
        part = _of_block(mine, base, ours.dtype, other.dtype)
        part.at += place if part.at >= 0 else 0
        _add(found, part)
        place += mine.size
    return found


def _side_by_side(ours: Tensor, other: Tensor, first: int, last: int) -> Iterator[tuple[Bits, Bits]]:
    """The same values of both, in one dimension, a few megabytes at a time."""
    wide = math.lcm(ours.grid[1], other.grid[1])  # it divides a row
    size = max(1, BLOCK_BYTES // max(wide * DTYPES[ours.dtype].storage.itemsize, 1)) * wide
    for start in range(first, last, size):
        end = min(start + size, last)
        yield _values(ours, start, end), _values(other, start, end)


def _values(tensor: Tensor, first: int, last: int) -> Bits:
    width = tensor.grid[1]
    parts = [block.reshape(-1) for _, block in tensor.blocks(first // width, last // width)]
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _of_block(mine: Bits, base: Bits, dtype: str, other: str) -> _Sums:
    found = _Sums()
    kept, was = ordered(mine, dtype) != 0, ordered(base, other) != 0
    cut, both = was & ~kept, kept & was
    found.cut, found.revived = int(np.count_nonzero(cut)), int(np.count_nonzero(kept & ~was))
    before = floats(base, other)
    size = np.abs(before)
    finite = np.isfinite(size)
    found.largest_cut = float(size[cut & finite].max(initial=-1.0))
    found.smallest_kept = float(size[both & finite].min(initial=np.inf))
    with np.errstate(over="ignore", invalid="ignore"):
        found.square = float(np.square(before, dtype=np.float64).sum())
        if dtype == other and not ((mine != base) & kept).any():  # only cut: most blocks
            found.moved = float(np.square(size[cut], dtype=np.float64).sum())
            return found
        after = floats(mine, dtype)
        moved = after.astype(np.float64) - before
    found.moved = float(np.square(moved).sum())
    distance = np.where(both & np.isfinite(moved), np.abs(moved), 0)
    differs = mine != base if dtype == other else after != before  # infinity less itself is NaN
    found.changed = int(np.count_nonzero(both & differs))
    if found.changed:
        place = int(distance.argmax())
        found.largest_change, found.at = float(distance[place]), place
        found.before, found.after = float(before[place]), float(after[place])
    return found


def floats(raw: Bits, dtype: str) -> NDArray[np.floating]:
    """The values, as float32 (F64: float64). Infinity and NaN are those of the dtype."""
    if dtype == "F64":
        return raw.view(np.float64)
    if dtype == "F32":
        return raw.view(np.float32)
    sign = np.uint32(raw.dtype.itemsize * 8 - 1)
    bits = magnitudes(raw, dtype) | (raw.astype(np.uint32) >> sign << np.uint32(31))
    return bits.view(np.float32)


def _add(total: _Sums, part: _Sums) -> None:
    total.cut += part.cut
    total.revived += part.revived
    total.changed += part.changed
    total.largest_cut = max(total.largest_cut, part.largest_cut)
    total.smallest_kept = min(total.smallest_kept, part.smallest_kept)
    total.moved += part.moved
    total.square += part.square
    if part.largest_change > total.largest_change:
        total.largest_change, total.at = part.largest_change, part.at
        total.before, total.after = part.before, part.after


def _change(sums: _Sums) -> Change:
    moved = sums.at >= 0
    distance = 0.0 if sums.moved == 0 else math.inf
    if sums.square > 0 and sums.moved:
        distance = math.sqrt(sums.moved / sums.square)
    return Change(
        cut=sums.cut,
        revived=sums.revived,
        changed=sums.changed,
        largest_cut=sums.largest_cut if sums.largest_cut >= 0 else None,
        smallest_kept=_finite(sums.smallest_kept),
        largest_change=sums.largest_change,
        at=sums.at if moved else None,
        before=_finite(sums.before) if moved else None,
        after=_finite(sums.after) if moved else None,
        distance=distance if math.isfinite(distance) else None,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
