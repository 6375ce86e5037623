"""About how many bytes a tensor takes when it is packed: the order-0 entropy of where its zeros are and
of its exponents, all other bits as they are. From every value, or from a sample."""

import math
from collections.abc import Sequence

import numpy as np

from lpsparse.checkpoint.counting import Count
from lpsparse.checkpoint.dtypes import FIELDS, ordered
from lpsparse.checkpoint.tensors import Tensor

_PLACES = 4  # of a tensor that are looked at,
_VALUES = 1 << 14  # and values at each: MiniLM is told to within 0.5 % of what all of them tell


def bound_bytes(size: int, kept: int, binades: Sequence[float], mantissa: int) -> int:
    """Of `size` values of which `kept` are not zero; `binades` says how often each exponent is there, as a
    share or a count."""
    whole = sum(binades) or 1
    return math.ceil((_bits([kept, size - kept]) + kept * (1 + mantissa) + _bits(binades) * kept / whole) / 8)


def _bits(counts: Sequence[float]) -> float:
    total = sum(counts)
    return sum(count * math.log2(total / count) for count in counts if count)


def sampled_bytes(tensor: Tensor, counted: Count) -> int:
    """`bound_bytes` of a tensor of floats, about. Where more is to be zero than is now (in a dry run), the
    largest values of the sample stand for what is kept."""
    lines, width = tensor.grid
    _, mantissa = FIELDS[tensor.dtype]
    some = max(1, _VALUES // max(width, 1))
    starts = sorted({place * (lines - some) // (_PLACES - 1) for place in range(_PLACES)})
    if lines <= some * _PLACES:
        some, starts = lines, [0]
    most = _VALUES * _PLACES  # of a line that is longer, its begin: a copy, so that the rest is not held
    blocks = [
        block.reshape(-1)[:most].copy() for first in starts for _, block in tensor.blocks(first, first + some)
    ]
    codes = np.sort(ordered(np.concatenate(blocks), tensor.dtype))
    kept = tensor.size - counted.zeros
    few = min(int(np.count_nonzero(codes)), math.ceil(codes.size * kept / tensor.size))
    _, counts = np.unique(codes[codes.size - few :] >> codes.dtype.type(mantissa), return_counts=True)
    return bound_bytes(tensor.size, kept, counts.tolist(), mantissa)
