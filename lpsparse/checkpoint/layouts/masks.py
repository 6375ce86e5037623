"""The mask plane of the packed layout: which values of a chunk are kept, as bits or as the gaps between them.

Kept are values that are not the all-zero bit pattern. docs/format.md specifies the bytes.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.layouts.frames import BrokenError, Bytes, box, unbox

Places = NDArray[np.int64]

_NONE, _ALL, _BITS, _GAPS = range(4)  # first byte of a plane
ALL_KEPT = bytes([_ALL])  # the plane of a mask without zeros
_GAPS_BELOW = 0.22  # share of values kept, under which gaps are fewer bytes than bits, and quicker
_PIECE = 1 << 17  # values whose places, 8 bytes each, are made at once: they stay in the cache


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
