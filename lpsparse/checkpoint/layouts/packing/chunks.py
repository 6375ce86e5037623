"""A tensor of the packed layout as one row of bytes: a head, then chunks that can be read alone.

  4 bytes "LPSP", 1 byte version (1), 1 byte number of dimensions, 2 zero bytes, 16 bytes dtype (ASCII), then
  as 8 bytes each: values of a chunk, the dimensions, and where each chunk ends; then the chunks, then
  zeros up to a multiple of 8 bytes. All numbers are little-endian.

A chunk holds some values of a tensor: floats as three planes (mask, exponents, signs with mantissas), all
others as planes of their bytes. docs/format.md specifies the bytes for writers and readers of other makes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, FIELDS, Bits
from lpsparse.checkpoint.layouts.packing.frames import BrokenError, box, join, keep_freed_memory, split, unbox
from lpsparse.checkpoint.layouts.packing.planes import (
    ALL_KEPT,
    decode_exponents,
    decode_mask,
    encode_exponents,
    encode_mask,
)
from lpsparse.errors import InputError

LEVELS = ("fast", "default", "max")
VERSION = 1
_MAGIC = b"LPSP"
_FIXED = 32  # bytes of a head before its dimensions
MOST_DIMENSIONS = 16
_MOST_CHUNK = 16 << 20  # dense bytes

AGAIN = "copy the file again, or pack the model again"
Read = Callable[[int, int], Bits]  # (first byte, count) of the stored bytes


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


def units_of(shape: tuple[int, ...], dtype: str) -> int:
    """Values of a tensor; of types under a byte, bytes."""
    return math.prod(shape) * DTYPES[dtype].bits // 8 // DTYPES[dtype].storage.itemsize


def head_bytes(shape: tuple[int, ...], dtype: str, chunk_values: int) -> int:
    return _FIXED + 8 * (len(shape) + -(-units_of(shape, dtype) // chunk_values))


def head(shape: tuple[int, ...], dtype: str, chunk_values: int, ends: list[int]) -> Bits:
    """`ends` are those of the chunks, from the first byte of the head on."""
    numbers = np.array([chunk_values, *shape, *ends], "<u8")
    fixed = _MAGIC + bytes([VERSION, len(shape), 0, 0]) + dtype.encode().ljust(16, b"\0")
    return np.frombuffer(fixed + numbers.tobytes(), np.uint8)


@dataclass(frozen=True, slots=True)
class Packed:
    """A checked tensor in the packed layout, decoded by ranges of values."""

    where: str
    dtype: str
    shape: tuple[int, ...]
    chunk_values: int
    bounds: Bits  # (chunks + 1,): chunk i is the bytes bounds[i]..bounds[i + 1]
    read: Read

    def values(self, first: int, last: int) -> Iterator[Bits]:
        """Values first..last, a chunk or its part at a time. Raises InputError."""
        total = units_of(self.shape, self.dtype)
        for chunk in range(first // self.chunk_values, -(-last // self.chunk_values)):
            start = chunk * self.chunk_values
            begin, end = int(self.bounds[chunk]), int(self.bounds[chunk + 1])
            stored = memoryview(self.read(begin, end - begin).view(np.uint8).data)
            try:
                found = decode_chunk(stored, min(self.chunk_values, total - start), self.dtype)
            except BrokenError as error:
                what = f"{self.where}: chunk {chunk} of {self.bounds.size - 1}: {error}"
                raise InputError(343, what, hint=AGAIN) from None
            yield found[max(first - start, 0) : last - start]


def read_packed(where: str, nbytes: int, read: Read) -> Packed:
    """Check the head of a tensor of `nbytes` stored bytes; nothing of the tensor's own size is allocated.
    Raises InputError."""

    def refuse(why: str) -> InputError:
        return InputError(343, f"{where}: {why}", hint=AGAIN)

    fixed = read(0, _FIXED).tobytes() if nbytes >= _FIXED else b""
    if fixed[:4] != _MAGIC:
        raise refuse(f"{nbytes} bytes do not begin as a packed tensor")
    if fixed[4] != VERSION:
        what = f"{where}: version {fixed[4]} of the packed layout: written by a newer lpsparse"
        raise InputError(336, what, hint="upgrade lpsparse")
    dimensions, dtype = fixed[5], fixed[8:24].rstrip(b"\0").decode("ascii", "replace")
    if fixed[6:8] != b"\0\0" or dimensions > MOST_DIMENSIONS or dtype not in DTYPES:
        raise refuse(f"{dimensions} dimensions of dtype {dtype!r} cannot be")
    if nbytes < _FIXED + 8 * dimensions:
        raise refuse("its head is cut short")
    chunk_values = int.from_bytes(fixed[24:32], "little")
    shape = tuple(int(n) for n in read(_FIXED, 8 * dimensions).view("<u8"))
    itemsize = DTYPES[dtype].storage.itemsize
    if math.prod(max(n, 1) for n in shape) >= 2**60 or math.prod(shape) * DTYPES[dtype].bits % 8:
        raise refuse(f"shape {shape} of {dtype} cannot be")
    if not 0 < chunk_values * itemsize <= _MOST_CHUNK:
        raise refuse(f"chunks of {chunk_values} values, the cap is {_MOST_CHUNK // itemsize}")
    first = head_bytes(shape, dtype, chunk_values)
    if nbytes < first or nbytes % 8:
        raise refuse(f"{nbytes} bytes cannot hold shape {shape} in chunks of {chunk_values}")
    start = _FIXED + 8 * dimensions
    bounds = np.concatenate([np.array([first], "<u8"), read(start, first - start).view("<u8")])
    sizes = np.diff(bounds.astype(np.float64))  # exact below 2**53, and never wraps
    last = int(bounds[-1])
    if (sizes <= 0).any() or not last <= nbytes < last + 8 or read(last, nbytes - last).any():
        raise refuse("its chunks do not fill it")
    if (sizes > 2 * chunk_values * itemsize + 8192).any():  # no writer needs so many
        raise refuse("a chunk is longer than what it holds")
    return Packed(where, dtype, shape, chunk_values, bounds, read)


def decode_all(stored: Any) -> tuple[str, Bits]:
    """The dtype of a whole packed tensor in memory (uint8, one dimension), and its bits in its shape."""
    data = np.ascontiguousarray(stored, np.uint8)
    packed = read_packed("a packed tensor", data.size, lambda first, count: data[first : first + count])
    found = np.empty(units_of(packed.shape, packed.dtype), DTYPES[packed.dtype].storage)
    done = 0
    for part in packed.values(0, found.size):
        found[done : done + part.size] = part
        done += part.size
    return packed.dtype, found.reshape(packed.shape if DTYPES[packed.dtype].bits >= 8 else -1)
