"""One weight file in each of the layouts: the tensors of a source's file, cut (or not) and encoded, block by
block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from lpsparse.checkpoint.counting import NOTHING, Count, Cuts, Sums, count, sums_of
from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.layouts import bitmask, packed
from lpsparse.checkpoint.layouts.chunks import encode_chunk
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Tensor, regrouped
from lpsparse.checkpoint.weights import (
    Named,
    Part,
    WeightFile,
    by_alignment,
    header_text,
    place,
    write_tensors,
)
from lpsparse.parallel.progress import advance
from lpsparse.parallel.threads import parallel_in_order

_ROOM = 32  # bytes that an entry of a header may be longer than was thought


@dataclass(frozen=True, slots=True)
class Wrote:
    names: tuple[str, ...]  # entries of the file
    sums: Sums  # of the tensors, as they were written
    changed: bool  # whether anything had to be written


Write = Callable[[Path, list[Tensor], Cuts, dict[str, str], str], Wrote]


def names_taken(tensors: list[Tensor], layout: str) -> list[str]:
    """Tensors that a reader of the layout would take for parts of others."""
    owners = {tensor.name for tensor in tensors}
    if layout == "bitmask":
        return sorted(name for name in owners if bitmask.is_taken(name, owners))
    if layout == "packed":
        return sorted(owners & {name + packed.SUFFIX for name in owners})
    return []


def _flow(tensors: list[Tensor], cut: Cuts, sums: Sums) -> Iterator[tuple[Tensor, int, Bits]]:
    """The blocks of all tensors, cut; their sums are taken on the way. What is packed and is not cut is
    decoded on all threads: the others must be read in their order."""

    def wanted() -> Iterator[tuple[Tensor, int, Bits | None, int]]:
        for tensor in tensors:
            apply = cut(tensor)
            if apply is None and tensor.layout != "dense":
                yield from ((tensor, first, None, last) for first, last in tensor.tasks(BLOCK_BYTES))
                continue
            blocks = apply(tensor.blocks()) if apply else tensor.blocks()
            yield from ((tensor, line, block, 0) for line, block in blocks)

    def made(item: tuple[Tensor, int, Bits | None, int]) -> tuple[Tensor, int, Bits, tuple[int, int]]:
        tensor, line, block, last = item
        if block is None:
            block = np.concatenate([each for _, each in tensor.blocks(line, last)])
        return tensor, line, block, sums_of(line, block)

    for tensor, line, block, (stored, total) in parallel_in_order(made, wanted()):
        known = sums[tensor.name]
        sums[tensor.name] = known[0] + stored, (known[1] + total) % 2**64
        advance(block.nbytes)
        yield tensor, line, block


def _write_dense(target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], _: str) -> Wrote:
    sums: Sums = {tensor.name: (0, 0) for tensor in tensors}
    entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    parts = ((tensor.name, line * block.shape[1], block) for tensor, line, block in _flow(tensors, cut, sums))
    return Wrote(tuple(sums), sums, write_tensors(target, entries, metadata, parts))


def _write_bitmask(target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], _: str) -> Wrote:
    """In two passes: the header says how many values there are."""
    sums: Sums = {tensor.name: (0, 0) for tensor in tensors}
    counted: dict[str, Count] = {}
    for tensor in tensors:
        apply = cut(tensor)
        found = count(tensor, apply(tensor.blocks()) if apply else tensor.blocks())
        if bitmask.pays(tensor.dtype, tensor.shape, found.stored):
            counted[tensor.name] = found
    entries = [e for t in tensors for e in entries_of(t, counted.get(t.name, NOTHING), t.name in counted)]

    def parts() -> Iterator[Part]:
        for tensor in tensors:
            flow = _flow([tensor], cut, sums)
            if tensor.name in counted:
                yield from _bitmask_parts(tensor, flow)
            else:
                yield from ((tensor.name, line * block.shape[1], block) for _, line, block in flow)

    changed = write_tensors(target, sorted(entries, key=by_alignment), metadata, parts())
    return Wrote(tuple(name for name, _, _ in entries), sums, changed)


def entries_of(tensor: Tensor, counted: Count, packs: bool) -> list[Named]:
    """The entries of a weight file that hold a tensor: itself, or the parts of the bitmask layout."""
    if packs:
        return bitmask.stored_shapes(tensor.name, tensor.dtype, tensor.shape, counted.stored)
    return [(tensor.name, tensor.dtype, tensor.shape)]


def _bitmask_parts(tensor: Tensor, flow: Iterator[tuple[Tensor, int, Bits]]) -> Iterator[Part]:
    values, mask, shape, offsets = bitmask.stored_names(tensor.name)
    yield shape, 0, np.array(tensor.shape, "<i8").view("<u8")
    stored, pieces = 0, tensor.grid[0] // tensor.rows
    for _, line, block in flow:
        parts = bitmask.encode(block, stored)
        yield values, stored, parts["compressed"]
        yield mask, line * parts["bitmask"].shape[1], parts["bitmask"]
        begun = -line % pieces  # of pieces of rows, those that begin one
        yield offsets, -(-line // pieces), parts["row_offsets"][begun::pieces]
        stored += parts["compressed"].size


def _write_packed(
    target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], level: str
) -> Wrote:
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
                entries.append((tensor.name + packed.SUFFIX, "U8", (size,)))
                end += size
        places = place(entries) + place([(each.name, each.dtype, each.shape) for each in left], end)
        starts = {each.name: each.offset for each in places}
        sums |= {tensor.name: (0, 0) for tensor in left}
        for tensor, line, block in _flow(left, cut, sums):
            file.put(starts[tensor.name] + line * block.shape[1] * block.itemsize, block)
        text = header_text(places, metadata | _manifest(tensors, left))
        file.finish(text, sum(each.nbytes for each in places))
    return Wrote(tuple(each.name for each in places), sums, file.changed)


def _manifest(tensors: list[Tensor], left: list[Tensor]) -> dict[str, str]:
    plain = {tensor.name for tensor in left}
    table = {each.name: None if each.name in plain else (each.dtype, each.shape) for each in tensors}
    return {packed.MANIFEST: packed.manifest(table)}


def room(tensors: list[Tensor], metadata: dict[str, str]) -> int:
    """Bytes that the header of a packed file is given."""
    names = [(tensor.name + packed.SUFFIX, tensor.dtype, tensor.shape) for tensor in tensors]
    text = header_text(place(names), metadata | _manifest(tensors, []))
    return len(text) + _ROOM * len(tensors)


def packed_sizes(source: Checkpoint, cut: Cuts, level: str) -> dict[str, int | None]:
    """Bytes of each tensor when it is packed; None where it stays as it is."""
    sums: Sums = {tensor.name: (0, 0) for tensor in source.tensors}
    lengths = {
        tensor.name: [packed.head_bytes(tensor.shape, tensor.dtype, _chunk_values(tensor))]
        for tensor in source.tensors
    }
    for tensor, stored in _encoded(list(source.tensors), cut, level, sums):
        lengths[tensor.name].append(len(stored))
    sizes = {name: -(-sum(parts) // 8) * 8 for name, parts in lengths.items()}
    return {
        tensor.name: sizes[tensor.name] if _pays(sizes[tensor.name], tensor) else None
        for tensor in source.tensors
    }


def _pays(size: int, tensor: Tensor) -> bool:
    return packed.pays(size, tensor.nbytes, len(tensor.shape))


_Chunks = Iterator[tuple[Tensor, bytes]]


def _encoded(tensors: list[Tensor], cut: Cuts, level: str, sums: Sums) -> _Chunks:
    """The chunks of all tensors, encoded on all threads."""

    def values() -> Iterator[tuple[Tensor, Bits]]:
        by_name = {tensor.name: tensor for tensor in tensors}
        for name, flow in groupby(_flow(tensors, cut, sums), key=lambda item: item[0].name):
            tensor = by_name[name]
            blocks = (block.reshape(-1) for _, _, block in flow)
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
    at, ends = packed.head_bytes(tensor.shape, tensor.dtype, values), list[int]()
    for _ in range(-(-packed.units_of(tensor.shape, tensor.dtype) // values)):
        _, stored = next(chunks)
        if _pays(at + len(stored), tensor):
            file.put(start + at, np.frombuffer(stored, np.uint8))
        at += len(stored)
        ends.append(at)
    size = -(-at // 8) * 8
    if not _pays(size, tensor):
        return None
    file.put(start + at, np.zeros(size - at, np.uint8))
    file.put(start, packed.head(tensor.shape, tensor.dtype, values, ends))
    return size


WRITERS: dict[str, Write] = {"dense": _write_dense, "bitmask": _write_bitmask, "packed": _write_packed}
