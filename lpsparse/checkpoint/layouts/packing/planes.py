"""Two planes of a chunk of the packed layout: which values are kept, and their exponents.

Kept are values that are not the all-zero bit pattern; the mask is stored as bits or as the gaps between them.
Huffman spends a bit at least on each of its symbols, and exponents of kept weights have one or two bits of
entropy: so a byte holds eight, four or two of them, by their rank, and the rare rest are escapes.
docs/format.md specifies the bytes.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.layouts.packing.frames import BrokenError, Bytes, box, join, split, unbox

Places = NDArray[np.int64]

_NONE, _ALL, _BITS, _GAPS = range(4)  # first byte of a plane
ALL_KEPT = bytes([_ALL])  # the plane of a mask without zeros
_GAPS_BELOW = 0.22  # share of values kept, under which gaps are fewer bytes than bits, and quicker
_PIECE = 1 << 17  # values whose places, 8 bytes each, are made at once: they stay in the cache
_LOSS = 0.03  # bits that Huffman loses on most bytes
_NO_EXPONENT = 1  # a bit of the mantissa, where a symbol stands for nothing in the table
_ESCAPE, _BYTE = 0.2, 0.08  # bits that the time of an escape (4 ns) and of a byte (1.5 ns) are worth


def encode_mask(mask: NDArray[np.bool], places: Places, level: str) -> bytes:
    """`places` are those where `mask` is set: not all of them."""
    if not places.size:
        return bytes([_NONE])
    low, both = places.size < _GAPS_BELOW * mask.size, level == "max"
    found: list[bytes] = []
    if low or both:
        gaps = _gaps_of(places)
        found.append(bytes([_GAPS]) + gaps.size.to_bytes(4, "little") + box(gaps, any_saving=both))
    if not low or both:
        found.append(bytes([_BITS]) + box(np.packbits(mask, bitorder="little"), any_saving=both))
    return min(found, key=len)


def _gaps_of(places: Places) -> Bytes:
    """Zeros before each kept value: a byte 255 for each whole 255 of them, then the rest."""
    gaps = np.diff(places, prepend=-1)
    gaps -= 1
    if gaps.max() < 255:
        return gaps.astype(np.uint8)
    ends = np.cumsum(gaps // 255 + 1) - 1
    stored = np.full(int(ends[-1]) + 1, 255, np.uint8)
    stored[ends] = gaps % 255
    return stored


def decode_mask(plane: memoryview, out: Bits) -> tuple[int, Iterator[tuple[Bits, Places]]]:
    """How many values of `out` are kept, and their places: in parts of `out`, which are zeroed on the way.
    Where all are, or none, there are no parts. Raises BrokenError."""
    mode, body = (plane[0], plane[1:]) if len(plane) else (-1, plane)
    if mode in (_ALL, _NONE) and not len(body):
        return (out.size if mode == _ALL else 0), iter(())
    if mode == _BITS:
        octets = unbox(body, -(-out.size // 8))
        if out.size % 8 and octets[-1] >> (out.size % 8):
            raise BrokenError("the mask keeps values beyond the last one")
        words = octets.size // 8 * 8
        count = np.bitwise_count(octets[:words].view("<u8")).sum(dtype=np.int64)
        return int(count + np.bitwise_count(octets[words:]).sum(dtype=np.int64)), _by_bits(octets, out)
    if mode == _GAPS and len(body) > 4:
        size = int.from_bytes(body[:4], "little")
        if 0 < size <= out.size:  # each byte moves on by one value at least
            gaps = unbox(body[4:], size)
            if gaps[-1] == 255:
                raise BrokenError("the mask ends in a gap")
            if size == out.size and gaps.any():  # nobody will look at where they are
                raise BrokenError("the mask keeps values beyond the last one")
            return size - int(np.count_nonzero(gaps == 255)), _by_gaps(gaps, out)
    raise BrokenError("the mask is of no known kind")


def _by_bits(octets: Bytes, out: Bits) -> Iterator[tuple[Bits, Places]]:
    for start in range(0, octets.size, _PIECE // 8):
        bits = np.unpackbits(octets[start : start + _PIECE // 8], bitorder="little")
        part = out[start * 8 : start * 8 + _PIECE]
        part.fill(0)  # now, so that it is in the cache when the values come
        yield part, np.flatnonzero(bits.view(np.bool))  # of bools: three times quicker than of bytes


def _by_gaps(gaps: Bytes, out: Bits) -> Iterator[tuple[Bits, Places]]:
    out.fill(0)
    last = -1
    for start in range(0, gaps.size, _PIECE):
        piece = gaps[start : start + _PIECE]
        places = np.add(piece, 1, dtype=np.int64)
        kept = piece != 255
        whole = bool(kept.all())
        if not whole:
            places -= ~kept
        places[0] += last
        np.cumsum(places, out=places)
        last = int(places[-1])
        if last >= out.size:
            raise BrokenError("the mask keeps values beyond the last one")
        yield out, places if whole else places[kept]


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
