"""The packed layout: a tensor W as one row of bytes, W.packed, where that is smaller.

What lies in those bytes is `layouts.packing`'s; docs/format.md specifies all of it.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from lpsparse.checkpoint.counting import Count, Cuts, Sums
from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import Entry, Header, unique_json
from lpsparse.checkpoint.layouts.base import PACKED_OPENS, Layout, Planned, Wrote, flow, read_exactly
from lpsparse.checkpoint.layouts.dense import dense_tensor
from lpsparse.checkpoint.layouts.packing.chunks import (
    AGAIN,
    MOST_DIMENSIONS,
    VERSION,
    encode_chunk,
    head,
    head_bytes,
    read_packed,
    units_of,
)
from lpsparse.checkpoint.safetensors_writer import Named, WeightFile, header_text, place
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Blocks, Tensor, grid_of, lines_at_once, regrouped
from lpsparse.errors import InputError
from lpsparse.parallel.threads import parallel_in_order

SUFFIX = ".packed"
MANIFEST = "lpsparse.manifest"  # key of the header's metadata
_WORTH = 128  # bytes that a packed tensor saves at least: so much longer are its names in the header
_ROOM = 32  # bytes that an entry of a header may be longer than was thought

_Chunks = Iterator[tuple[Tensor, bytes]]


class _Described(BaseModel, frozen=True, extra="forbid"):
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0, lt=2**60)], ...]


class _Plain(BaseModel, frozen=True, extra="forbid"):
    """Stored under its own name, as in any safetensors file."""


class _Manifest(BaseModel, frozen=True, extra="forbid"):
    format_version: int
    layout: Literal["packed"]
    tensors: dict[str, _Described | _Plain]


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
    return stored_bytes + _WORTH <= dense_bytes and dimensions <= MOST_DIMENSIONS


def _open(path: Path, header: Header) -> list[Tensor]:
    """What the manifest in the header lists, no more and no less. Raises InputError."""
    entries = {entry.name: entry for entry in header.entries}
    tensors: list[Tensor] = []
    with path.open("rb") as file:
        for name, described in read_manifest(path, header.metadata).items():
            stored = name if described is None else name + SUFFIX
            entry = entries.pop(stored, None)
            if entry is None:
                what = f"{path}: {stored!r} is missing, its manifest lists it"
                raise InputError(343, what, hint=AGAIN)
            if described is None:
                tensors.append(dense_tensor(path, entry))
            else:
                tensors.append(_encoded_tensor(path, file, name, entry, described))
    if entries:
        what = f"{path}: {next(iter(entries))!r} is not in its manifest"
        raise InputError(343, what, hint=AGAIN)
    return tensors


def _encoded_tensor(
    path: Path, opened: Any, name: str, entry: Entry, described: tuple[str, tuple[int, ...]]
) -> Tensor:
    """`opened` is the file of `path`, where the head is read from."""

    def read(first: int, count: int) -> Bits:
        with path.open("rb") as file:
            return read_exactly(file, entry, first, count)

    where = f"{path}: {name!r}"
    if (entry.dtype, entry.shape) != ("U8", (entry.nbytes,)):
        what = f"{where}: is stored as {entry.dtype} {entry.shape}, not as one row of bytes"
        raise InputError(343, what, hint=AGAIN)
    found = read_packed(where, entry.nbytes, partial(read_exactly, opened, entry))
    found = replace(found, read=read)
    if (found.dtype, found.shape) != described:
        what = f"{where}: {found.dtype} {found.shape}, its manifest has {described[0]} {described[1]}"
        raise InputError(343, what, hint=AGAIN)

    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        lines, width = grid_of(found.shape, found.dtype)
        step = lines_at_once(width, found.dtype)
        parts = found.values(first * width, (lines if last is None else last) * width)
        for block in regrouped(parts, step * width):
            yield first, block.reshape(-1, width)
            first += block.size // width

    return Tensor(name, found.dtype, found.shape, path.name, "packed", entry.nbytes, blocks)


def _write(target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], level: str) -> Wrote:
    """In one pass: how long a tensor gets is seen when it is written, so the header, which says it, is the
    last. Tensors that are not smaller are written after the others, as they are."""
    sums: Sums = {tensor.name: (0, 0) for tensor in tensors}
    entries: list[Named] = []
    left: list[Tensor] = []
    with WeightFile(target, room(tensors, metadata)) as file:
        end, chunks = 0, _encoded(tensors, cut, level, sums)
        for tensor in tensors:
            size = _put_packed(file, end, tensor, chunks)
            if size is None:
                left.append(tensor)
            else:
                entries.append((tensor.name + SUFFIX, "U8", (size,)))
                end += size
        places = place(entries) + place([(each.name, each.dtype, each.shape) for each in left], end)
        starts = {each.name: each.offset for each in places}
        sums |= {tensor.name: (0, 0) for tensor in left}
        for tensor, line, block in flow(left, cut, sums):
            file.put(starts[tensor.name] + line * block.shape[1] * block.itemsize, block)
        text = header_text(places, metadata | _manifest(tensors, left))
        file.finish(text, sum(each.nbytes for each in places))
    return Wrote(tuple(each.name for each in places), sums, file.changed)


def _plan(
    tensors: list[Tensor], counts: dict[str, Count], cut: Cuts, metadata: dict[str, str], level: str
) -> Planned:
    """Encodes all of it: how long a chunk gets is seen when it is made."""
    sums: Sums = {tensor.name: (0, 0) for tensor in tensors}
    lengths = {
        tensor.name: [head_bytes(tensor.shape, tensor.dtype, _chunk_values(tensor))] for tensor in tensors
    }
    for tensor, stored in _encoded(tensors, cut, level, sums):
        lengths[tensor.name].append(len(stored))
    sizes = {name: -(-sum(parts) // 8) * 8 for name, parts in lengths.items()}
    stored = {each.name: sizes[each.name] for each in tensors if _pays(sizes[each.name], each)}
    held = sum(stored.get(each.name, each.nbytes) for each in tensors)
    return Planned(stored, held + 8 + room(tensors, metadata))


def _manifest(tensors: list[Tensor], left: list[Tensor]) -> dict[str, str]:
    plain = {tensor.name for tensor in left}
    table = {each.name: None if each.name in plain else (each.dtype, each.shape) for each in tensors}
    return {MANIFEST: manifest(table)}


def room(tensors: list[Tensor], metadata: dict[str, str]) -> int:
    """Bytes that the header of a packed file is given."""
    names = [(tensor.name + SUFFIX, tensor.dtype, tensor.shape) for tensor in tensors]
    text = header_text(place(names), metadata | _manifest(tensors, []))
    return len(text) + _ROOM * len(tensors)


def _pays(size: int, tensor: Tensor) -> bool:
    return pays(size, tensor.nbytes, len(tensor.shape))


def _encoded(tensors: list[Tensor], cut: Cuts, level: str, sums: Sums) -> _Chunks:
    """The chunks of all tensors, encoded on all threads."""

    def values() -> Iterator[tuple[Tensor, Bits]]:
        by_name = {tensor.name: tensor for tensor in tensors}
        for name, items in groupby(flow(tensors, cut, sums), key=lambda item: item[0].name):
            tensor = by_name[name]
            blocks = (block.reshape(-1) for _, _, block in items)
            yield from ((tensor, each) for each in regrouped(blocks, _chunk_values(tensor)))

    return parallel_in_order(lambda item: (item[0], encode_chunk(item[1], item[0].dtype, level)), values())


def _chunk_values(tensor: Tensor) -> int:
    """Of whole lines, about as many as are read at a time; a line that is longer is divided anywhere."""
    lines, width = tensor.grid
    most = BLOCK_BYTES // DTYPES[tensor.dtype].storage.itemsize
    return most if width > most else max(1, BLOCK_BYTES * lines // max(tensor.nbytes, 1)) * max(width, 1)


def _put_packed(file: WeightFile, start: int, tensor: Tensor, chunks: _Chunks) -> int | None:
    """Write the chunks of a tensor, then its head; its bytes, or None where it is to be written as it is."""
    values = _chunk_values(tensor)
    at, ends = head_bytes(tensor.shape, tensor.dtype, values), list[int]()
    for _ in range(-(-units_of(tensor.shape, tensor.dtype) // values)):
        _, stored = next(chunks)
        if _pays(at + len(stored), tensor):
            file.put(start + at, np.frombuffer(stored, np.uint8))
        at += len(stored)
        ends.append(at)
    size = -(-at // 8) * 8
    if not _pays(size, tensor):
        return None
    file.put(start + at, np.zeros(size - at, np.uint8))
    file.put(start, head(tensor.shape, tensor.dtype, values, ends))
    return size


def _names_taken(names: set[str]) -> list[str]:
    return sorted(names & {name + SUFFIX for name in names})


PACKED = Layout(
    "packed",
    PACKED_OPENS,
    open=_open,
    write=_write,
    plan=_plan,
    stored_names=lambda name: (name + SUFFIX,),
    names_taken=_names_taken,
    has_levels=True,
)
