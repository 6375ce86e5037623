"""Exact selection by magnitude over any number of weights,
in constant memory. Sources: radix select (textbook).

Keys are the integers of `checkpoint.dtypes.magnitudes`: their order is the order of magnitudes.
"""

from collections.abc import Callable, Iterator
from decimal import Decimal
from math import floor

import numpy as np

from lpsparse.checkpoint.dtypes import Bits

_DIGIT = 16  # bits a pass: 65,536 counters


def target_count(sparsity: Decimal, size: int, zeros: int) -> int:
    """How many weights must be zero: max(floor(S * N), zeros already there), S read as a decimal."""
    return max(floor(sparsity * size), zeros)


def kth_smallest(keys: Callable[[], Iterator[Bits]], k: int, *, wide: bool) -> int:
    """The k-th smallest key (k from 1), in two passes over 2**16 counters each; four when `wide` (uint64)."""
    prefix = 0
    for shift in range((64 if wide else 32) - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for block in keys():
            kind = block.dtype.type
            flat = block.ravel()
            if shift + _DIGIT < flat.dtype.itemsize * 8:
                flat = flat[(flat >> kind(shift + _DIGIT)) == kind(prefix)]
            digits = ((flat >> kind(shift)) & kind((1 << _DIGIT) - 1)).astype(np.int64)
            counts += np.bincount(digits, minlength=1 << _DIGIT)
        below = np.cumsum(counts)
        digit = int(np.searchsorted(below, k))
        k -= int(below[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT) | digit
    return prefix


def cut_smallest(block: Bits, keys: Bits, threshold: int, ties: int) -> int:
    """Set to +0 in place what is below `threshold`,
    and the first `ties` that equal it; how many ties were cut."""
    kind = keys.dtype.type
    equal = np.flatnonzero(keys.ravel() == kind(threshold))[:ties]
    block[keys < kind(threshold)] = 0
    block.reshape(-1)[equal] = 0
    return equal.size


def cut_rows(block: Bits, keys: Bits, sparsity: Decimal) -> None:
    """Zero the smallest of each row of (rows, columns) in place, ties by position; exact in every row."""
    columns = block.shape[1]
    zeros = columns - np.count_nonzero(keys, axis=1)
    wanted = np.maximum(floor(sparsity * columns), zeros)  # (rows,)
    order = np.argsort(keys, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(columns)[None, :], axis=1)
    block[rank < wanted[:, None]] = 0
