"""The exponent plane of the packed layout: the exponents of the kept values of a chunk, several to a byte.

Huffman spends a bit at least on each of its symbols, and exponents of kept weights have one or two bits of
entropy: so a byte holds eight, four or two of them, by their rank, and the rare rest are escapes.
docs/format.md specifies the bytes.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.layouts.frames import BrokenError, Bytes, box, join, split, unbox

_LOSS = 0.03  # bits that Huffman loses on most bytes
_NO_EXPONENT = 1  # a bit of the mantissa, where a symbol stands for nothing in the table
_ESCAPE, _BYTE = 0.2, 0.08  # bits that the time of an escape (4 ns) and of a byte (1.5 ns) are worth


def encode_exponents(exponents: Bits, *, any_saving: bool = False) -> bytes:
    """`exponents` are uint8, or uint16 where they have more than 8 bits."""
    counts = counts_of(exponents)
    by_rank = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if by_rank.size <= 1:
        return bytes([0]) + by_rank.astype("<u2").tobytes()
    bits = _symbol_bits(counts[by_rank])
    escape, each = (1 << bits) - 1, 8 // bits
    ranks = np.full(counts.size, escape, np.uint8)
    ranks[by_rank[:escape]] = np.arange(len(by_rank[:escape]))
    symbols = np.zeros(-(-exponents.size // each) * each, np.uint8)
    symbols[: exponents.size] = ranks.take(exponents)
    packed = symbols[::each].copy()
    for i in range(1, each):
        packed |= symbols[i::each] << np.uint8(i * bits)
    rest = exponents[symbols[: exponents.size] == escape] if by_rank.size > escape else exponents[:0]
    table = by_rank[:escape].astype("<u2").tobytes()
    boxes = [box(each, any_saving=any_saving) for each in (packed, rest.view(np.uint8))]
    return bytes([bits]) + join([table, *boxes])


def counts_of(exponents: Bits) -> NDArray[np.int64]:
    """Of each exponent up to the largest; of bytes two at a time, which is half the work."""
    if exponents.itemsize > 1 or exponents.size < 1 << 17:
        return np.bincount(exponents)
    pairs = np.bincount(exponents[: exponents.size // 2 * 2].view("<u2"), minlength=1 << 16)
    table = pairs.reshape(256, 256)
    counts = table.sum(axis=0) + table.sum(axis=1)
    counts += np.bincount(exponents[exponents.size // 2 * 2 :], minlength=256)
    return counts[: np.flatnonzero(counts)[-1] + 1]


def _symbol_bits(counts: NDArray[np.int64]) -> int:
    """How many bits a symbol is to have, by an estimate of bytes and time; `counts` by rank."""
    total = int(counts.sum())

    def cost(bits: int) -> float:
        head, tail = counts[: (1 << bits) - 1], counts[(1 << bits) - 1 :]
        packed, rare = total * bits / 8, int(tail.sum())
        size = max(_entropy(np.append(head, rare)) + _LOSS * packed, packed)
        if np.count_nonzero(tail) > 1:
            size += max(_entropy(tail), rare)
        return size + _ESCAPE * rare + _BYTE * packed

    return min((1, 2, 4, 8), key=cost)


def _entropy(counts: NDArray[np.int64]) -> float:
    """Bits of so many of each symbol, all together."""
    some = counts[counts > 0]
    return float((some * np.log2(some.sum() / some)).sum()) if some.size > 1 else 0.0


def decode_exponents(
    plane: memoryview, count: int, kind: np.dtype[np.unsignedinteger], fields: tuple[int, int]
) -> Bits:
    """The exponents of `count` values, at their place in a value of `kind`, whose exponent and mantissa have
    so many bits; one for all where they are equal. Raises BrokenError."""
    exponent_bits, shift = fields[0], kind.type(fields[1])
    if not len(plane) or plane[0] not in (0, 1, 2, 4, 8):
        raise BrokenError("the exponents are of no known kind")
    bits, body = plane[0], plane[1:]
    parts = split(body, 3) if bits else [body]
    if len(parts[0]) % 2 or len(parts[0]) // 2 > max(1, (1 << bits) - 1):
        raise BrokenError("the table of exponents has the wrong length")
    table = np.frombuffer(parts[0], "<u2")
    if (table >> exponent_bits).any() or (not table.size and (count or bits)):
        raise BrokenError("the table of exponents is empty, or holds what is none")
    if not bits:
        return table.astype(kind) << shift
    packed, escape, each = unbox(parts[1], -(-count * bits // 8)), (1 << bits) - 1, 8 // bits
    values = np.full(1 << bits, _NO_EXPONENT, kind)
    values[: table.size] = table.astype(kind) << shift
    found = values[_symbols(bits)].take(packed, axis=0).reshape(-1)  # 8 / bits values of each byte
    places = np.flatnonzero(found == _NO_EXPONENT)
    if (_symbols(bits)[packed[places // each], places % each] != escape).any():
        raise BrokenError("a symbol stands for no exponent")
    wide = np.dtype("<u2" if exponent_bits > 8 else "u1")
    rest = unbox(parts[2], places.size * wide.itemsize).view(wide)
    if (rest >> exponent_bits).any() or (places >= count).any():
        raise BrokenError("an exponent is none, or no value's")
    found[places] = rest.astype(kind) << shift
    return found[:count]


@cache
def _symbols(bits: int) -> Bytes:
    """(256, 8 / bits): the symbols in each byte, lowest first."""
    return (np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1).astype(np.uint8)
