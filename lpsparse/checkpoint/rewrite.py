"""The one loop of every command that writes a checkpoint:
read a block, cut it (or not), encode it, write it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits, infinity, magnitudes
from lpsparse.checkpoint.layouts import bitmask
from lpsparse.checkpoint.opening import Blocks, Checkpoint, Tensor
from lpsparse.checkpoint.writer import Named, Part, weight_file_names, write_index, write_tensors
from lpsparse.errors import InputError

Cut = Callable[[Blocks], Blocks]  # a stream of row blocks in, the same rows out with more zeros


@dataclass(frozen=True, slots=True)
class Count:
    """What is in a tensor, counted block by block."""

    zeros: int  # exact zeros of either sign (for integers: zero)
    stored: int  # values that are not the all-zero bit pattern: -0.0 counts
    nonfinite: int


def count(tensor: Tensor, blocks: Blocks) -> Count:
    zeros = stored = nonfinite = 0
    is_float = DTYPES[tensor.dtype].is_float
    for _, block in blocks:
        keys = magnitudes(block, tensor.dtype) if is_float else block
        zeros += int(block.size - np.count_nonzero(keys))
        stored += int(np.count_nonzero(block))
        nonfinite += int(np.count_nonzero(keys >= infinity(keys))) if is_float else 0
    return Count(zeros, stored, nonfinite)


def check_finite(where: str, tensor: Tensor, keys: Bits) -> None:
    """Raise InputError when a block of magnitude keys has NaN or Inf in it."""
    bad = int(np.count_nonzero(keys >= infinity(keys)))
    if bad:
        what = f"{where}: {tensor.name!r}: {bad} values are NaN or Inf"
        raise InputError(334, what, mend="mend the checkpoint; `lpsparse report` lists the tensors")


def rewrite(
    source: Checkpoint, folder: Path, cut: Callable[[Tensor], Cut | None], layout: str
) -> dict[str, Count]:
    """Write `source` into `folder` in `layout` (dense or bitmask),
    applying `cut`; what was written, by tensor.

    Decides nothing. Keeps the source's sharding. Raises InputError on NaN or Inf in any float tensor.
    """
    names = weight_file_names(source, packed=layout == "bitmask")
    weight_map: dict[str, str] = {}
    counts: dict[str, Count] = {}
    total_bytes = 0
    for path in source.files:
        tensors = [tensor for tensor in source.tensors if tensor.file == path.name]
        streams = {tensor.name: _stream(source, tensor, cut(tensor)) for tensor in tensors}
        counts |= {tensor.name: count(tensor, streams[tensor.name]()) for tensor in tensors}
        packed = {
            tensor.name
            for tensor in tensors
            if layout == "bitmask" and bitmask.pays(tensor.dtype, tensor.shape, counts[tensor.name].stored)
        }
        taken = [t.name for t in tensors if layout == "bitmask" and bitmask.is_taken(t.name, packed)]
        if taken:
            what = f"{source.name}/{path.name}: {taken[0]!r}: this name belongs to the bitmask layout"
            raise InputError(342, what, mend="keep this model dense, or rename the tensor")
        entries = [entry for t in tensors for entry in entries_of(t, counts[t.name], t.name in packed)]
        metadata = metadata_of(source, path.name, layout)
        parts = (part for t in tensors for part in _parts(t, streams[t.name](), t.name in packed))
        write_tensors(folder / names[path.name], entries, metadata, parts)
        weight_map |= {name: names[path.name] for name, _, _ in entries}
        total_bytes += sum(tensor.nbytes for tensor in tensors)
    if len(source.files) > 1:
        write_index(folder, "lpsparse" if layout == "bitmask" else "model", weight_map, total_bytes)
    return counts


def follow(source: Checkpoint) -> None:
    """Read what `rewrite` to dense reads, in its order, and write nothing: for the processes that only give
    their parts of the tensors."""
    for path in source.files:
        tensors = [tensor for tensor in source.tensors if tensor.file == path.name]
        for tensor in (*tensors, *tensors):  # counted first, then written
            for _ in tensor.blocks():
                pass


def _stream(source: Checkpoint, tensor: Tensor, cut: Cut | None) -> Callable[[], Blocks]:
    def blocks() -> Blocks:
        if not DTYPES[tensor.dtype].is_float:
            return tensor.blocks()
        return cut(_finite(source, tensor)) if cut else _finite(source, tensor)

    return blocks


def _finite(source: Checkpoint, tensor: Tensor) -> Blocks:
    for row, block in tensor.blocks():
        check_finite(f"{source.name}/{tensor.file}", tensor, magnitudes(block, tensor.dtype))
        yield row, block


def metadata_of(source: Checkpoint, file: str, layout: str) -> dict[str, str]:
    """What the header of a weight file says in `layout`: the source's own, and how to read it."""
    metadata = {k: v for k, v in source.metadata[file].items() if not k.startswith("lpsparse.")}
    metadata.setdefault("format", "pt")  # transformers asks for it
    if layout == "bitmask":
        metadata |= {"lpsparse.layout": "bitmask", "lpsparse.format_version": "1"}
    return metadata


def entries_of(tensor: Tensor, counted: Count, packed: bool) -> list[Named]:
    """The entries of a weight file that hold a tensor: itself, or the parts of the bitmask layout."""
    if packed:
        return bitmask.stored_shapes(tensor.name, tensor.dtype, tensor.shape, counted.stored)
    return [(tensor.name, tensor.dtype, tensor.shape)]


def _parts(tensor: Tensor, blocks: Blocks, packed: bool) -> Iterator[Part]:
    if packed:
        yield f"{tensor.name}.shape", 0, np.array(tensor.shape, "<i8").view("<u8")
    stored = 0
    for row, block in blocks:
        if packed:
            parts = bitmask.encode(block, stored)
            width = parts["bitmask"].shape[1]
            yield f"{tensor.name}.compressed", stored, parts["compressed"]
            yield f"{tensor.name}.bitmask", row * width, parts["bitmask"]
            yield f"{tensor.name}.row_offsets", row, parts["row_offsets"]
            stored += parts["compressed"].size
        else:
            yield tensor.name, row * block.shape[1], block
