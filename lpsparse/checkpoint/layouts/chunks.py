"""One chunk of the packed layout: some values of a tensor, by themselves. Floats are three planes (mask,
exponents, signs with mantissas), all others are planes of their bytes. docs/format.md specifies the bytes."""

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, FIELDS, Bits
from lpsparse.checkpoint.layouts.exponents import decode_exponents, encode_exponents
from lpsparse.checkpoint.layouts.frames import box, join, keep_freed_memory, split, unbox
from lpsparse.checkpoint.layouts.masks import ALL_KEPT, decode_mask, encode_mask

LEVELS = ("fast", "default", "max")


def encode_chunk(values: Bits, dtype: str, level: str) -> bytes:
    """`values` are in one dimension. `fast` leaves signs and mantissas as they are, `max` tries both codings
    of the mask and takes any saving."""
    thrifty = level == "max"
    if dtype not in FIELDS:
        octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize)
        return join([box(np.ascontiguousarray(each), any_saving=thrifty) for each in octets.T])
    mask = values != 0
    if values.size and mask.all():
        kept, mask_plane = values, ALL_KEPT
    else:
        places = np.flatnonzero(mask)
        kept, mask_plane = values[places], encode_mask(mask, places, level)
    exponent_bits, mantissa_bits = FIELDS[dtype]
    kind = values.dtype.type
    exponents = kept >> kind(mantissa_bits) & kind((1 << exponent_bits) - 1)
    rest = kept >> kind(exponent_bits)
    rest &= kind(1 << mantissa_bits)
    rest |= kept & kind((1 << mantissa_bits) - 1)
    return join(
        [
            mask_plane,
            encode_exponents(exponents.astype("<u2" if exponent_bits > 8 else "u1"), any_saving=thrifty),
            _encode_rest(rest, 1 + mantissa_bits, level),
        ]
    )


def _encode_rest(rest: Bits, width: int, level: str) -> bytes:
    """Whole bytes as planes of bytes, lowest first; the bits above them as planes of bits."""
    octets = np.ascontiguousarray(rest).view(np.uint8).reshape(rest.size, rest.itemsize)
    planes = [np.ascontiguousarray(octets[:, i]) for i in range(width // 8)]
    for bit in range(width // 8 * 8, width):
        one = rest >> rest.dtype.type(bit) & rest.dtype.type(1)
        planes.append(np.packbits(one.astype(np.uint8), bitorder="little"))
    return join(
        [plane.tobytes() if level == "fast" else box(plane, any_saving=level == "max") for plane in planes]
    )


def decode_chunk(stored: memoryview, count: int, dtype: str) -> Bits:
    """The `count` values of a chunk. Raises BrokenError for what `encode_chunk` does not make; whatever it
    says, no more is allocated than a few times the values."""
    keep_freed_memory()
    kind = DTYPES[dtype].storage
    if dtype not in FIELDS:
        planes = [unbox(part, count) for part in split(stored, kind.itemsize)]
        return np.stack(planes, axis=1).reshape(-1).view(kind)
    fields = FIELDS[dtype]
    mask, exponent_plane, rest_plane = split(stored, 3)
    out = np.empty(count, kind)
    kept, parts = decode_mask(mask, out)
    exponents = decode_exponents(exponent_plane, kept, kind, fields)
    values = _spread(_decode_rest(rest_plane, kept, 1 + fields[1], kind), fields)
    if kept == count:
        return np.bitwise_or(values, exponents, out=out)
    values |= exponents
    if not kept:
        out.fill(0)
    done = 0
    for part, places in parts:
        part[places] = values[done : done + places.size]
        done += places.size
    return out


def _decode_rest(plane: memoryview, count: int, width: int, kind: np.dtype[np.unsignedinteger]) -> Bits:
    whole = width // 8
    parts = split(plane, whole + width % 8)
    rest = np.zeros(count, kind)
    for i, part in enumerate(parts[whole:]):
        bits = np.unpackbits(unbox(part, -(-count // 8)), count=count, bitorder="little")
        rest |= bits.astype(kind) << kind.type(i)
    for i, part in enumerate(reversed(parts[:whole])):
        octets = unbox(part, count)
        if i == 0 and width % 8 == 0:
            rest = octets.astype(kind)
            continue
        rest <<= kind.type(8)
        rest |= octets
    return rest


def _spread(rest: Bits, fields: tuple[int, int]) -> Bits:
    """Signs and mantissas to their places in the value, in place; zeros where the exponents go."""
    exponent_bits, mantissa_bits = fields
    kind = rest.dtype.type
    if (exponent_bits, mantissa_bits) == (8, 7):
        rest *= kind(0x101)  # a byte of sign and mantissa: one pass for both
    else:
        rest |= (rest & kind(1 << mantissa_bits)) << kind(exponent_bits)
    rest &= kind(1 << (mantissa_bits + exponent_bits) | (1 << mantissa_bits) - 1)
    return rest
