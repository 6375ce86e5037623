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

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.counting import Count, Cuts, Sums, count
from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import Entry, Header, unique_json
from lpsparse.checkpoint.layouts.base import PACKED_OPENS, Layout, Planned, Wrote, flow, read_exactly
from lpsparse.checkpoint.layouts.dense import dense_tensor
from lpsparse.checkpoint.safetensors_writer import Named, Part, by_alignment, file_size, write_tensors
from lpsparse.checkpoint.tensors import Blocks, Tensor, grid_of, lines_at_once
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


def stored_shapes(name: str, dtype: str, shape: tuple[int, ...], stored: int) -> list[Named]:
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
    return _bytes(stored_shapes("", dtype, shape, stored)) < math.prod(shape) * DTYPES[dtype].bits // 8


def _bytes(parts: list[Named]) -> int:
    return sum(math.prod(shape) * DTYPES[dtype].bits // 8 for _, dtype, shape in parts)


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


def _open(path: Path, header: Header) -> list[Tensor]:
    entries = {entry.name: entry for entry in header.entries}
    tensors: list[Tensor] = []
    for entry in header.entries:
        prefix, _, part = entry.name.rpartition(".")
        if part in PARTS and f"{prefix}.bitmask" in entries:
            if part == "bitmask":
                tensors.append(_encoded_tensor(path, name_of(prefix), entries))
        else:
            tensors.append(dense_tensor(path, entry))
    try:
        order = list(unique_json(header.metadata.get("lpsparse.order", "[]")))
    except (ValueError, TypeError):
        order = []
    places = {str(name): place for place, name in enumerate(order)}
    return sorted(tensors, key=lambda tensor: places.get(tensor.name, len(places)))


def _encoded_tensor(path: Path, name: str, entries: dict[str, Entry]) -> Tensor:
    named = zip(PARTS, stored_names(name), strict=True)
    parts = {part: entries[stored] for part, stored in named if stored in entries}

    def read(part: str, first: int, count: int) -> Bits:
        with path.open("rb") as file:
            return read_exactly(file, parts[part], first, count)

    return bitmask_tensor(name, path.name, check(f"{path}: {name!r}", parts, read))


def bitmask_tensor(name: str, file: str, parts: Packed, layout: str = "bitmask") -> Tensor:
    """A weight of the bitmask layout, or of one that is decoded like it."""

    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        lines, width = grid_of(parts.shape, parts.dtype)
        end = lines if last is None else last
        if lines > parts.rows:
            yield from parts.decode_pieces(first, end, width)
            return
        step = lines_at_once(width, parts.dtype)
        for row in range(first, end, step):
            yield row, parts.decode(row, min(end, row + step))

    return Tensor(name, parts.dtype, parts.shape, file, layout, parts.stored_bytes, blocks)


def _write(target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], _: str) -> Wrote:
    """In two passes: the header says how many values there are."""
    sums: Sums = {tensor.name: (0, 0) for tensor in tensors}
    counts: dict[str, Count] = {}
    for tensor in tensors:
        apply = cut(tensor)
        counts[tensor.name] = count(tensor, apply(tensor.blocks()) if apply else tensor.blocks())
    encoded, entries = _entries(tensors, counts)

    def parts() -> Iterator[Part]:
        for tensor in tensors:
            blocks = flow([tensor], cut, sums)
            if tensor.name in encoded:
                yield from _parts(tensor, blocks)
            else:
                yield from ((tensor.name, line * block.shape[1], block) for _, line, block in blocks)

    changed = write_tensors(target, sorted(entries, key=by_alignment), metadata, parts())
    return Wrote(tuple(name for name, _, _ in entries), sums, changed)


def _plan(
    tensors: list[Tensor], counts: dict[str, Count], cut: Cuts, metadata: dict[str, str], level: str
) -> Planned:
    stored, entries = _entries(tensors, counts)
    return Planned(stored, file_size(entries, metadata))


def _entries(tensors: list[Tensor], counts: dict[str, Count]) -> tuple[dict[str, int], list[Named]]:
    """Bytes of each tensor that is encoded, and the entries of a file that holds them all."""
    stored: dict[str, int] = {}
    entries: list[Named] = []
    for tensor in tensors:
        kept = counts[tensor.name].stored
        if pays(tensor.dtype, tensor.shape, kept):
            parts = stored_shapes(tensor.name, tensor.dtype, tensor.shape, kept)
            stored[tensor.name] = _bytes(parts)
            entries += parts
        else:
            entries.append((tensor.name, tensor.dtype, tensor.shape))
    return stored, entries


def _parts(tensor: Tensor, blocks: Iterator[tuple[Tensor, int, Bits]]) -> Iterator[Part]:
    values, mask, shape, offsets = stored_names(tensor.name)
    yield shape, 0, np.array(tensor.shape, "<i8").view("<u8")
    stored, pieces = 0, tensor.grid[0] // tensor.rows
    for _, line, block in blocks:
        parts = encode(block, stored)
        yield values, stored, parts["compressed"]
        yield mask, line * parts["bitmask"].shape[1], parts["bitmask"]
        begun = -line % pieces  # of pieces of rows, those that begin one
        yield offsets, -(-line // pieces), parts["row_offsets"][begun::pieces]
        stored += parts["compressed"].size


def _names_taken(names: set[str]) -> list[str]:
    return sorted(name for name in names if is_taken(name, names))


def _metadata(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Its parts lie in an order of their own: this is the tensors'."""
    return {"lpsparse.order": json.dumps([tensor.name for tensor in tensors], ensure_ascii=False)}


BITMASK = Layout(
    "bitmask",
    PACKED_OPENS,
    open=_open,
    write=_write,
    plan=_plan,
    stored_names=stored_names,
    names_taken=_names_taken,
    metadata=_metadata,
)
