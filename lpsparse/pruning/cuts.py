"""Set weights to zero in place: the smallest, by row, by N:M group and by block.

Groups and blocks are read so that each is complete in one piece."""

from decimal import Decimal
from math import floor, gcd

import numpy as np

from lpsparse.checkpoint.dtypes import Bits, magnitudes
from lpsparse.checkpoint.tensors import Blocks, Tensor

Pair = tuple[int, int]


def table_of(tensor: Tensor) -> Pair:
    """Rows and columns for blocks and groups. The first two of three dimensions (experts) are rows, else the
    first one."""
    rows = tensor.shape[0] * tensor.shape[1] if len(tensor.shape) == 3 else tensor.rows
    return rows, tensor.size // max(rows, 1)


def divides(tensor: Tensor, rows: int, columns: int) -> bool:
    """Whether a tensor consists of such blocks."""
    high, wide = table_of(tensor)
    whole = tensor.rows if len(tensor.shape) < 3 else high // max(tensor.rows, 1)
    return not (high % rows or whole % rows or wide % columns)


def grain_of(tensor: Tensor, n_m: Pair | None, block: Pair | None) -> int:
    """How many lines hold complete groups, or complete blocks."""
    group = n_m[1] if n_m else block[0] * table_of(tensor)[1] if block else 1
    return group // max(gcd(group, tensor.grid[1]), 1)


def joined(blocks: Blocks, lines: int) -> Blocks:
    """The same blocks with a multiple of `lines` lines each."""
    held: list[Bits] = []
    start = count = 0
    for line, block in blocks:
        if not held:
            start, count = line, 0
        held.append(block)
        count += len(block)
        whole = count - count % lines
        if whole:
            together = np.concatenate(held) if len(held) > 1 else block
            yield start, together[:whole]
            held, start, count = [together[whole:]] if whole < count else [], start + whole, count - whole
    assert not count or not held, "lines are left over"


def sums_of_blocks(scores: Bits, dtype: str, width: int, block: Pair) -> Bits:
    """The sum of the scores of each block in some lines of a tensor, as ordered integers of float64."""
    rows, columns = block
    values = magnitudes(scores, dtype, wide=True).view(np.float64).reshape(-1, width)
    with np.errstate(over="ignore"):  # an infinite sum is a large one
        across = values.reshape(len(values), -1, columns).sum(axis=2)
    total = across[::rows].copy()
    for row in range(1, rows):  # one after another, so that it never depends on what is read together
        with np.errstate(over="ignore"):
            total += across[row::rows]
    return total.view(np.uint64)


def cut_smallest(block: Bits, codes: Bits, threshold: int, ties: int) -> int:
    """Set to +0 what scores below `threshold`, and the first `ties` that equal it. Returns how many ties were
    cut."""
    np.multiply(block, codes >= codes.dtype.type(threshold), out=block)
    if not ties:
        return 0
    equal = np.flatnonzero(codes.ravel() == codes.dtype.type(threshold))[:ties]
    block.reshape(-1)[equal] = 0
    return equal.size


def cut_rows(block: Bits, codes: Bits, sparsity: Decimal) -> None:
    """Zero the smallest of each row of (rows, columns), ties by position; exact in every row."""
    columns = block.shape[1]
    wanted = floor(sparsity * columns)
    if wanted == 0:
        block[codes == 0] = 0  # -0
        return
    kth = np.partition(codes, wanted - 1, axis=1)[:, wanted - 1 : wanted]  # (rows, 1); 0 where more are zero
    below, equal = codes < kth, codes == kth
    left = wanted - np.count_nonzero(below, axis=1)[:, None]
    first = np.where(kth == 0, columns, left)
    np.multiply(block, ~(below | (equal & (np.cumsum(equal, axis=1) <= first))), out=block)


def cut_n_m(block: Bits, codes: Bits, n: int, m: int) -> None:
    """Leave at most `n` non-zeros, the largest, in each `m` neighbours of a row; ties by position."""
    groups = [np.ascontiguousarray(codes.reshape(-1, m)[:, i]) for i in range(m)]
    ranks = [np.zeros(len(groups[0]), np.uint16) for _ in range(m)]  # how many of the group are cut before it
    for j in range(m):
        for i in range(j):
            first = groups[i] <= groups[j]
            ranks[j] += first
            ranks[i] += ~first
    kept = np.stack([rank >= m - n for rank in ranks], axis=1)
    np.multiply(block, kept.reshape(block.shape), out=block)


def cut_blocks(block: Bits, keep: Bits, rows: int, columns: int) -> None:
    """Zero the blocks of `rows` x `columns` whose entry in `keep` is False."""
    np.multiply(block, keep.repeat(rows, axis=0).repeat(columns, axis=1), out=block)
