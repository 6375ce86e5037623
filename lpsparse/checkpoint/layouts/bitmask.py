"""The bitmask layout: non-zero values and one bit a weight, byte for byte as compressed-tensors 0.9 to 0.14.

For a weight M.weight of shape (d0, ...), seen as d0 rows of `columns` values:
  M.compressed   1-D, the weight's dtype: the non-zero values in row order
  M.bitmask      uint8 (d0, ceil(columns / 8)), least significant bit first: 1 is a stored value
  M.shape        int64 (ndim,)
  M.row_offsets  int64 (d0,): where each row starts in M.compressed
What compressed-tensors never packed is ours: a tensor W of another name has M = W.tensor, and one of more
than two dimensions is flattened. A value is "zero" when all its bits are zero: -0.0 is stored (it reads that,
and would have written +0.0), and unpacking is bit-exact.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import Entry
from lpsparse.errors import InputError

PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_AGAIN = "pack the model again"
_MOST_DIMENSIONS = 16
_WHOLE = ".tensor"  # after it a prefix has the whole name before it, without it all but `.weight`
Read = Callable[[str, int, int], Bits]  # (part, first unit, count) -> storage units


def prefix_of(name: str) -> str:
    """What the names of its parts begin with."""
    module = name.removesuffix(".weight")
    return name + _WHOLE if module == name or module.endswith(_WHOLE) else module


def name_of(prefix: str) -> str:
    """The tensor with this prefix: one of each, whatever they are."""
    return prefix.removesuffix(_WHOLE) if prefix.endswith(_WHOLE) else prefix + ".weight"


def stored_names(name: str) -> tuple[str, ...]:
    prefix = prefix_of(name)
    return tuple(f"{prefix}.{part}" for part in PARTS)


def stored_shapes(
    name: str, dtype: str, shape: tuple[int, ...], stored: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the four tensors that hold a weight with `stored` non-zero values."""
    rows, columns = shape[0], math.prod(shape[1:])
    values, mask, size, offsets = stored_names(name)
    return [
        (values, dtype, (stored,)),
        (mask, "U8", (rows, -(-columns // 8))),
        (size, "I64", (len(shape),)),
        (offsets, "I64", (rows,)),
    ]


def pays(dtype: str, shape: tuple[int, ...], stored: int) -> bool:
    """Whether the four parts take fewer bytes than the dense tensor."""
    if not 2 <= len(shape) <= _MOST_DIMENSIONS or not DTYPES[dtype].is_float or math.prod(shape) == 0:
        return False
    parts = stored_shapes("", dtype, shape, stored)
    packed = sum(math.prod(s) * DTYPES[d].bits // 8 for _, d, s in parts)
    return packed < math.prod(shape) * DTYPES[dtype].bits // 8


def is_taken(name: str, packed: set[str]) -> bool:
    """Whether a dense tensor of this name, beside the `packed` ones,
    would be read as a part of a packed one."""
    prefix, _, part = name.rpartition(".")
    return part == "bitmask" or (part in PARTS and name_of(prefix) in packed)


def encode(block: Bits, stored_before: int) -> dict[str, Bits]:
    """The parts of a block of rows, or of pieces of a row of whole bytes of the mask; `stored_before` values
    came before it."""
    mask = block != 0
    counts = mask.sum(axis=1, dtype=np.int64)
    offsets = stored_before + np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int64)
    return {
        "compressed": block[mask],
        "bitmask": np.packbits(mask, axis=1, bitorder="little"),
        "row_offsets": offsets.astype("<i8").view("<u8"),
    }


@dataclass(frozen=True, slots=True)
class Packed:
    """A checked weight in the bitmask layout, decoded by ranges of rows."""

    where: str
    dtype: str
    shape: tuple[int, ...]
    columns: int
    stored_bytes: int
    offsets: Bits  # (rows + 1,): row r's values are compressed[offsets[r]:offsets[r + 1]]
    read: Read
    hint: str = _AGAIN

    @property
    def rows(self) -> int:
        return self.shape[0]

    def decode(self, first: int, last: int) -> Bits:
        """Rows first..last as (rows, columns) of raw bits.
        Raises InputError when mask and values disagree."""
        size = -(-self.columns // 8)
        mask = self._mask(first * size, last - first, self.columns)
        begin, end = int(self.offsets[first]), int(self.offsets[last])
        expected = np.diff(self.offsets[first : last + 1].astype(np.int64))
        if not np.array_equal(mask.sum(axis=1, dtype=np.int64), expected):
            raise self._refusal(first, last - 1)
        return self._filled(mask, begin, end)

    def decode_pieces(self, first: int, last: int, width: int) -> Iterator[tuple[int, Bits]]:
        """Pieces first..last of `width` values, whole bytes of the mask, of rows that are made of several.
        Raises InputError as `decode` does."""
        pieces = self.columns // width
        begin = int(self.offsets[first // pieces])
        for line in range(first - first % pieces, first):
            begin += int(self._mask(line * width // 8, 1, width).sum())
        for line in range(first, last):
            row, piece = divmod(line, pieces)
            mask = self._mask(line * width // 8, 1, width)
            end, bound = begin + int(mask.sum()), int(self.offsets[row + 1])
            if end > bound or (piece == pieces - 1 and end < bound):
                raise self._refusal(row, row)
            yield line, self._filled(mask, begin, end)
            begin = end

    def _mask(self, first: int, rows: int, columns: int) -> NDArray[np.bool]:
        size = -(-columns // 8)
        bits = self.read("bitmask", first, rows * size).reshape(rows, size)
        return np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(bool)

    def _filled(self, mask: NDArray[np.bool], begin: int, end: int) -> Bits:
        block = np.zeros(mask.shape, DTYPES[self.dtype].storage)
        block[mask] = self.read("compressed", begin, end - begin)
        return block

    def _refusal(self, first: int, last: int) -> InputError:
        what = f"{self.where}: bitmask and row_offsets count different values in rows {first}..{last}"
        return InputError(341, what, hint=self.hint)


def check(where: str, parts: dict[str, Entry], read: Read, hint: str = _AGAIN) -> Packed:
    """Check that the four parts agree, before anything of
    the weight's size is allocated. Raises InputError."""

    def refuse(why: str) -> InputError:
        return InputError(340, f"{where}: {why}", hint=hint)

    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise refuse(f"its {', '.join(missing)} is missing")
    values, mask, size, offsets = (parts[part] for part in PARTS)
    if len(size.shape) != 1 or not 2 <= size.shape[0] <= _MOST_DIMENSIONS or size.dtype != "I64":
        raise refuse(f"its shape part is not int64 of 2 to {_MOST_DIMENSIONS} dimensions")
    shape = tuple(int(n) for n in read("shape", 0, size.shape[0]))
    if math.prod(max(n, 1) for n in shape) >= 2**60:
        raise refuse(f"shape {shape} has more than 2**60 values")
    rows, columns = shape[0], math.prod(shape[1:])
    if mask.dtype != "U8" or mask.shape != (rows, -(-columns // 8)):
        raise refuse(
            f"bitmask is {mask.dtype} {mask.shape}, shape {shape} needs ({rows}, {-(-columns // 8)})"
        )
    if offsets.dtype != "I64" or offsets.shape != (rows,) or len(values.shape) != 1:
        raise refuse("row_offsets or compressed have the wrong form")
    if not DTYPES[values.dtype].is_float:
        raise refuse(f"values of {values.dtype} cannot be packed")
    bounds = np.append(read("row_offsets", 0, rows), np.uint64(values.shape[0]))
    if rows and (bounds[0] != 0 or bool(np.any(bounds[1:] < bounds[:-1]))):
        raise refuse("row_offsets do not rise from 0 to the number of values")
    stored = sum(entry.nbytes for entry in (values, mask, size, offsets))
    return Packed(where, values.dtype, shape, columns, stored, bounds, read, hint)
