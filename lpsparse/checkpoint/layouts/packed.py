"""The packed layout: a tensor as one row of bytes, W.packed, made of chunks that can be read alone.

  4 bytes "LPSP", 1 byte version (1), 1 byte number of dimensions, 2 zero bytes, 16 bytes dtype (ASCII), then
  as 8 bytes each: values of a chunk, the dimensions, and where each chunk ends; then the chunks, then
  zeros up to a multiple of 8 bytes. All numbers are little-endian; chunks are those of `layouts.chunks`.

docs/format.md specifies it for writers and readers of other makes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import unique_json
from lpsparse.checkpoint.layouts.chunks import decode_chunk
from lpsparse.checkpoint.layouts.frames import BrokenError
from lpsparse.errors import InputError

SUFFIX = ".packed"
VERSION = 1
_MAGIC = b"LPSP"
_FIXED = 32  # bytes of a head before its dimensions
_MOST_DIMENSIONS = 16
_MOST_CHUNK = 16 << 20  # dense bytes
_WORTH = 128  # bytes that a packed tensor saves at least: so much longer are its names in the header

MANIFEST = "lpsparse.manifest"  # key of the header's metadata

AGAIN = "copy the file again, or pack the model again"
Read = Callable[[int, int], Bits]  # (first byte, count) of the stored bytes


class _Described(BaseModel, frozen=True, extra="forbid"):
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0, lt=2**60)], ...]


class _Plain(BaseModel, frozen=True, extra="forbid"):
    """Stored under its own name, as in any safetensors file."""


class _Manifest(BaseModel, frozen=True, extra="forbid"):
    format_version: int
    layout: Literal["packed"]
    tensors: dict[str, _Described | _Plain]


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


def manifest(tensors: dict[str, tuple[str, tuple[int, ...]] | None]) -> str:
    """What a file holds, in the order of the source: dtype and shape of what is packed."""
    as_text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    lines = (
        f"{as_text(name)}:{as_text({} if each is None else {'dtype': each[0], 'shape': each[1]})}"
        for name, each in tensors.items()
    )
    return f'{{"format_version":{VERSION},"layout":"packed","tensors":{{{",".join(lines)}}}}}'


def read_manifest(path: Path, metadata: dict[str, str]) -> dict[str, tuple[str, tuple[int, ...]] | None]:
    """Raises InputError for anything but what `manifest` makes, of this version."""
    try:
        found = _Manifest.model_validate(unique_json(metadata.get(MANIFEST, "")), strict=False)
    except ValueError as error:  # pydantic's too
        what = f"{path}: its manifest is not understood: {str(error).splitlines()[0]}"
        raise InputError(343, what, hint=AGAIN) from None
    if found.format_version != VERSION:
        what = f"{path}: version {found.format_version} of the packed layout: written by a newer lpsparse"
        raise InputError(336, what, hint="upgrade lpsparse")
    return {
        name: (each.dtype, each.shape) if isinstance(each, _Described) else None
        for name, each in found.tensors.items()
    }


def pays(stored_bytes: int, dense_bytes: int, dimensions: int) -> bool:
    return stored_bytes + _WORTH <= dense_bytes and dimensions <= _MOST_DIMENSIONS


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
    if fixed[6:8] != b"\0\0" or dimensions > _MOST_DIMENSIONS or dtype not in DTYPES:
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
