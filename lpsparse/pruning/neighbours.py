"""Groups of neighbours in a tensor, as N:M and blocks see them: read so that each lies in one piece."""

from math import gcd

import numpy as np

from lpsparse.checkpoint.dtypes import Bits, magnitudes
from lpsparse.checkpoint.tensors import Blocks, Tensor

Pair = tuple[int, int]


def table_of(tensor: Tensor) -> Pair:
    """Rows and columns as blocks and neighbours see them: of three dimensions (experts) the first two are
    rows, else the first one."""
    rows = tensor.shape[0] * tensor.shape[1] if len(tensor.shape) == 3 else tensor.rows
    return rows, tensor.size // max(rows, 1)


def divides(tensor: Tensor, rows: int, columns: int) -> bool:
    """Whether a tensor consists of such blocks."""
    high, wide = table_of(tensor)
    whole = tensor.rows if len(tensor.shape) < 3 else high // max(tensor.rows, 1)
    return not (high % rows or whole % rows or wide % columns)


def grain_of(tensor: Tensor, n_m: Pair | None, block: Pair | None) -> int:
    """Lines that are made of whole groups, or whole blocks."""
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


def sums_of_blocks(raw: Bits, tensor: Tensor, block: Pair) -> Bits:
    """Sums of the magnitudes of the blocks in some lines of a tensor: ordered integers of float64."""
    rows, columns = block
    values = magnitudes(raw, tensor.dtype, wide=True).view(np.float64).reshape(-1, table_of(tensor)[1])
    with np.errstate(over="ignore"):  # an infinite sum is a large one
        across = values.reshape(len(values), -1, columns).sum(axis=2)
    total = across[::rows].copy()
    for row in range(1, rows):  # one after another, so that it never depends on what is read together
        with np.errstate(over="ignore"):
            total += across[row::rows]
    return total.view(np.uint64)
