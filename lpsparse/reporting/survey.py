"""Survey every value once: zeros, special values, magnitudes by powers of two, and patterns of zeros (N:M,
rows, columns, heads, blocks)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.counting import Count
from lpsparse.checkpoint.dtypes import DTYPES, FIELDS, Bits, infinity, magnitudes, ordered
from lpsparse.checkpoint.layouts.packing.planes import counts_of
from lpsparse.checkpoint.layouts.retired import config_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.parallel.progress import advance, phase
from lpsparse.parallel.threads import parallel
from lpsparse.reporting.bound import bound_bytes
from lpsparse.reporting.budgets.zeros import N_M
from lpsparse.reporting.records import ATTENTION_ROWS, Detail, Histogram, kind_of

_GROUPS = {name: int(name.partition(":")[2]) for name in N_M}  # how large one is
_SIDES = (4, 16)  # of blocks
_TASK_BYTES = 32 << 20  # what a thread looks at at a time
_SMALL_BYTES = 64 << 10
_NEAR = 10  # powers of two under the largest magnitude: near zero

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]
Task = TypeVar("Task", bound=tuple[Any, ...])
Result = TypeVar("Result")


@dataclass(slots=True)
class Found:
    """The findings in some lines of a tensor; those of one tensor add up."""

    zeros: int = 0
    negative_zeros: int = 0
    nan: int = 0
    inf: int = 0
    largest: int = 0  # integer of `ordered`, finite
    smallest: int = -1  # of the non-zero ones; -1: none
    binades: Counts = field(default_factory=lambda: np.zeros(0, np.int64))  # non-zero values by exponent
    n_m: Counts = field(default_factory=lambda: np.zeros(len(N_M), np.int64))  # groups that hold so few
    lines: list[Flags] = field(default_factory=list[Flags])  # of each line, whether it has a non-zero
    columns: Flags | None = None  # of each column likewise
    blocks: Counts = field(default_factory=lambda: np.zeros(len(_SIDES), np.int64))  # that are all zero

    def add(self, other: "Found") -> None:
        self.zeros += other.zeros
        self.negative_zeros += other.negative_zeros
        self.nan += other.nan
        self.inf += other.inf
        self.largest = max(self.largest, other.largest)
        if other.smallest >= 0:
            self.smallest = other.smallest if self.smallest < 0 else min(self.smallest, other.smallest)
        self.binades = other.binades if not self.binades.size else self.binades + other.binades
        self.n_m = self.n_m + other.n_m
        self.lines += other.lines
        if other.columns is not None:
            self.columns = other.columns if self.columns is None else self.columns | other.columns
        self.blocks = self.blocks + other.blocks


def survey(checkpoint: Checkpoint, *, patterns: bool = True) -> tuple[dict[str, Count], dict[str, Detail]]:
    """The counts of `count_all` (without sums), and details of tensors of floats. Reads each value once."""
    ranges = [(tensor, _tasks(tensor)) for tensor in checkpoint.tensors]
    tasks = [(tensor, *lines) for tensor, each in ranges for lines in each]
    heads = _head_size(checkpoint)
    parts = {tensor.name: Found() for tensor, each in ranges if len(each) != 1}
    told: dict[str, tuple[Count, Detail | None]] = {}

    def look(task: tuple[Tensor, int, int]) -> Found | tuple[Count, Detail | None]:
        """A tensor that is one task is summed up at once, because the findings are larger than the sums."""
        tensor, found = task[0], _look(*task, patterns)
        return found if tensor.name in parts else _tell(tensor, found, heads, patterns)

    with phase("reading", checkpoint.dense_bytes):
        for (tensor, *_), part in on_each(look, tasks):
            if isinstance(part, Found):
                parts[tensor.name].add(part)
            else:
                told[tensor.name] = part
    for name, found in parts.items():
        told[name] = _tell(checkpoint[name], found, heads, patterns)
    counts = {name: count for name, (count, _) in told.items()}
    return counts, {name: detail for name, (_, detail) in told.items() if detail is not None}


def _tell(tensor: Tensor, found: Found, heads: int | None, patterns: bool) -> tuple[Count, Detail | None]:
    stored = tensor.size - found.zeros + found.negative_zeros
    count = Count(found.zeros, stored, found.nan + found.inf, 0)
    return count, _detail(tensor, found, heads, patterns) if DTYPES[tensor.dtype].is_float else None


def on_each(work: Callable[[Task], Result], tasks: list[Task]) -> Iterator[tuple[Task, Result]]:
    """Each task, which starts with its tensor, and its result. One thread takes all small tensors: there
    Python's own work dominates, which two threads cannot share."""
    small = [task for task in tasks if task[0].nbytes < _SMALL_BYTES]
    groups = [small, *([task] for task in tasks if task[0].nbytes >= _SMALL_BYTES)]
    found = parallel(lambda group: [work(task) for task in group], groups)
    for group, results in zip(groups, found, strict=True):
        yield from zip(group, results, strict=True)


def _tasks(tensor: Tensor) -> list[tuple[int, int]]:
    """Ranges of lines that blocks of rows do not cross."""
    lines, width = tensor.grid
    side = max(_SIDES)
    step = max(1, _TASK_BYTES // max(width * DTYPES[tensor.dtype].storage.itemsize * side, 1)) * side
    return [(line, min(line + step, lines)) for line in range(0, lines, step)]


def _look(tensor: Tensor, first: int, last: int, patterns: bool) -> Found:
    found = Found()
    whole = tensor.grid[0] == tensor.rows  # a line is a row
    for block in _aligned(tensor.blocks(first, last), max(_SIDES) if whole else 1):
        advance(block.nbytes)
        if DTYPES[tensor.dtype].is_float:
            found.add(look_at(block, tensor.dtype, patterns and len(tensor.shape) > 1, whole))
        else:
            found.zeros += block.size - int(np.count_nonzero(block))
    return found


def _aligned(blocks: Blocks, lines: int) -> Iterator[Bits]:
    """The same lines, so that all but the last are a multiple of `lines`: most are not copied."""
    held: list[Bits] = []
    count = 0
    for _, block in blocks:
        if count:
            missing = min(lines - count, len(block))
            held.append(block[:missing])
            block, count = block[missing:], count + missing
            if count < lines:
                continue
            yield np.concatenate(held)
            held, count = [], 0
        whole = len(block) - len(block) % lines
        if whole:
            yield block[:whole]
        if whole < len(block):
            held, count = [block[whole:]], len(block) - whole
    if held:
        yield np.concatenate(held)


def look_at(block: Bits, dtype: str, matrix: bool, whole: bool) -> Found:
    """The findings in lines of raw bits. `matrix`: look for patterns of zeros; `whole`: lines are rows."""
    found = Found()
    if not block.size:
        return found
    codes = ordered(block, dtype)
    exponent, mantissa = FIELDS[dtype]
    zeros = codes.size - int(np.count_nonzero(codes))
    found.zeros = zeros
    if zeros:
        found.negative_zeros = zeros - (block.size - int(np.count_nonzero(block)))
    found.largest, found.smallest = int(codes.max()), int((codes - codes.dtype.type(1)).min()) + 1
    if zeros == codes.size:
        found.largest, found.smallest = 0, -1
    limit = infinity(dtype)
    if found.largest >= limit:
        _special(found, codes, limit, dtype)
    found.binades = _binades(codes >> codes.dtype.type(mantissa), 1 << exponent)
    found.binades[0] -= zeros
    if matrix:
        _patterns(found, codes != 0, whole)
    return found


def _special(found: Found, codes: Bits, limit: int, dtype: str) -> None:
    """NaN and Inf, and the extremes without them."""
    bad = codes >= codes.dtype.type(limit)
    if dtype != "F8_E4M3":  # which has NaN alone
        found.inf = int(np.count_nonzero(codes == codes.dtype.type(limit)))
    found.nan = int(np.count_nonzero(bad)) - found.inf
    finite = codes[~bad]
    some = finite[finite != 0]
    found.largest = int(some.max()) if some.size else 0
    found.smallest = int(some.min()) if some.size else -1


def _binades(exponents: Bits, count: int) -> Counts:
    """How many there are of each."""
    counts = counts_of(exponents.reshape(-1).astype(np.uint8 if count <= 256 else np.uint16))
    found = np.zeros(count, np.int64)
    found[: counts.size] = counts
    return found


def _patterns(found: Found, kept: Flags, whole: bool) -> None:
    """`kept`: (lines, width), whether a value is not zero."""
    lines, width = kept.shape
    found.lines = [np.logical_or.reduce(kept, axis=1)]
    if whole:
        found.columns = np.logical_or.reduce(kept, axis=0)
    if width % 4 or not width:
        return
    fours = (kept.reshape(-1).view("<u4") * np.uint32(0x01010101) >> np.uint32(24)).astype(np.uint8)
    fours = fours.reshape(lines, -1)  # non-zeros in each four neighbours of a line
    few = [int(np.count_nonzero(fours <= N_M["1:4"])), int(np.count_nonzero(fours <= N_M["2:4"])), 0]
    if width % 8 == 0:
        few[2] = int(np.count_nonzero(fours[:, ::2] + fours[:, 1::2] <= N_M["4:8"]))
    found.n_m = np.array(few)
    if whole:
        found.blocks = np.array([_empty_blocks(fours, side) for side in _SIDES])


def _empty_blocks(fours: NDArray[np.uint8], side: int) -> int:
    """How many complete blocks of side x side are all zero."""
    lines, width = len(fours) // side * side, fours.shape[1] * 4 // side * (side // 4)
    if (fours.shape[1] * 4) % side or not lines:
        return 0
    tall = fours[:lines, :width].reshape(lines // side, side, -1).max(axis=1)
    wide = tall.reshape(len(tall), -1, side // 4).max(axis=2)
    return wide.size - int(np.count_nonzero(wide))


def _detail(tensor: Tensor, found: Found, head_size: int | None, patterns: bool) -> Detail:
    exponent, mantissa = FIELDS[tensor.dtype]
    bias = (1 << (exponent - 1)) - 1
    binades = found.binades if found.binades.size else np.zeros(1 << exponent, np.int64)
    binades[-1] -= found.nan + found.inf
    used = np.flatnonzero(binades)
    first, last = (int(used[0]), int(used[-1])) if used.size else (0, -1)
    kept = int(binades.sum())
    sizes = [code for code in (found.smallest, found.largest) if code > 0]
    values = _values(sizes, tensor.dtype)
    return Detail(
        negative_zeros=found.negative_zeros,
        subnormal=int(binades[0]),
        nan=found.nan,
        inf=found.inf,
        near_zero=int(binades[: max(last - _NEAR, 0)].sum()),
        smallest=values[0] if values else None,
        largest=values[-1] if values else None,
        histogram=Histogram(first=first - bias, counts=tuple(binades[first : last + 1].tolist())),
        n_m=_groups(tensor, found) if patterns else {},
        empty=_empty(tensor, found, head_size) if patterns else {},
        bound_bytes=bound_bytes(tensor.size, kept, binades[used].tolist(), mantissa),
    )


def _values(codes: list[int], dtype: str) -> list[float]:
    """Magnitudes of integers of `ordered`."""
    bits = magnitudes(np.array(codes, DTYPES[dtype].storage), dtype, wide=True)
    return [float(value) for value in bits.view(np.float64)]


def _groups(tensor: Tensor, found: Found) -> dict[str, tuple[int, int]]:
    """The N:M counts of a tensor whose rows are made of complete groups."""
    width = tensor.grid[1]
    if len(tensor.shape) < 2 or not tensor.size:
        return {}
    return {
        name: (count, tensor.size // size)
        for (name, size), count in zip(_GROUPS.items(), found.n_m.tolist(), strict=True)
        if width % size == 0
    }


def _empty(tensor: Tensor, found: Found, head_size: int | None) -> dict[str, tuple[int, int]]:
    """How many rows, columns, heads and complete blocks of a matrix are all zero."""
    if len(tensor.shape) < 2 or not tensor.size:
        return {}
    pieces = tensor.grid[0] // tensor.rows
    rows = np.logical_or.reduce(np.concatenate(found.lines).reshape(tensor.rows, pieces), axis=1)
    empty = {"rows": _none_of(rows, 1)}
    kind = kind_of(tensor.name, tensor.shape) if head_size else None
    if "c_attn" in tensor.name or "c_proj" in tensor.name:
        head_size = None  # of GPT-2, which has a layer's inputs as rows
    if head_size and kind in ATTENTION_ROWS and tensor.rows % head_size == 0:
        empty["heads"] = _none_of(rows, head_size)
    if found.columns is None:
        return empty
    empty["columns"] = _none_of(found.columns, 1)
    if head_size and kind == "attention out" and found.columns.size % head_size == 0:
        empty["heads"] = _none_of(found.columns, head_size)
    for side, count in zip(_SIDES, found.blocks, strict=True):
        if tensor.grid[1] % side == 0 and tensor.rows >= side:
            whole = tensor.rows // side * (tensor.grid[1] // side)
            empty[f"blocks {side}x{side}"] = (int(count), whole)
    return empty


def _none_of(kept: Flags, size: int) -> tuple[int, int]:
    groups: Flags = np.logical_or.reduce(kept.reshape(-1, size), axis=1)
    return groups.size - int(np.count_nonzero(groups)), groups.size


def _head_size(checkpoint: Checkpoint) -> int | None:
    """Rows of an attention head by config.json; None if it does not say."""
    config = config_of(checkpoint.root)
    text = config.get("text_config")
    table = cast("dict[str, Any]", text) if isinstance(text, dict) else config
    heads, width = (
        _whole(table, *names) for names in (("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
    )
    given = _whole(table, "head_dim")
    return given or (width // heads if heads and width and width % heads == 0 else None)


def _whole(table: dict[str, Any], *names: str) -> int | None:
    found = next((table[name] for name in names if name in table), None)
    return found if isinstance(found, int) and 0 < found < 1 << 20 else None
