"""One weight file, in whichever layout: its tensors, of which nothing is read yet."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.foreign import refuse_archive
from lpsparse.checkpoint.header import Entry, Header, read_header, sniff, unique_json
from lpsparse.checkpoint.layouts import bitmask, packed
from lpsparse.checkpoint.names import TORCH_FILES
from lpsparse.checkpoint.tensors import Blocks, Tensor, grid_of, lines_at_once, regrouped
from lpsparse.errors import InputError
from lpsparse.parallel.threads import check_going_on


def open_file(path: Path, key: str | None = None) -> tuple[list[Tensor], dict[str, str], tuple[str, ...]]:
    """`key` says which table of tensors in a torch file is meant."""
    if path.suffix != ".safetensors":
        refuse_archive(path)
    if path.suffix in TORCH_FILES:
        return _open_torch(path, key)
    header = read_header(path)
    layout, version = (header.metadata.get(f"lpsparse.{each}") for each in ("layout", "format_version"))
    if layout not in (None, "bitmask", "packed") or version not in (None, "1"):
        what = f"{path}: layout {layout!r}, version {version!r}: written by a newer lpsparse"
        raise InputError(336, what, hint="upgrade lpsparse")
    if layout is not None:
        opened = (_open_bitmask if layout == "bitmask" else _open_packed)(path, header)
        return opened, header.metadata, ()
    dense = [_dense(path, entry) for entry in header.entries]
    return dense, header.metadata, ()


def stored_names(tensor: Tensor) -> tuple[str, ...]:
    """The entries of a weight file that hold a tensor."""
    if tensor.layout == "bitmask":
        return bitmask.stored_names(tensor.name)
    return (tensor.name + (packed.SUFFIX if tensor.layout == "packed" else ""),)


def _open_torch(path: Path, key: str | None) -> tuple[list[Tensor], dict[str, str], tuple[str, ...]]:
    with path.open("rb") as file:
        head = file.read(512)
    for magic in (b"version https://git-lfs", b"<"):
        if head.startswith(magic):
            sniff(path, head)
    from lpsparse.checkpoint.torchfile import read_torch_file  # the one door through which torch comes in

    found = read_torch_file(path, key)

    def tensor(name: str, dtype: str, raw: Bits) -> Tensor:
        def blocks(first: int = 0, last: int | None = None) -> Blocks:
            if not raw.size:
                return
            lines, width = grid_of(raw.shape, dtype)
            step = lines_at_once(width, dtype)
            end = lines if last is None else last
            # A view with strides of its own is never copied as a whole.
            values = raw.reshape(-1) if raw.flags.c_contiguous else raw.flat
            for line in range(first, end, step):
                yield line, values[line * width : min(line + step, end) * width].reshape(-1, width)

        return Tensor(name, dtype, raw.shape, path.name, "dense", raw.nbytes, blocks)

    tensors = [tensor(name, *item) for name, item in found.tensors.items()]
    return tensors, {"format": "pt", **found.ties}, found.notes


@dataclass(frozen=True, slots=True)
class _Dense:
    """The blocks of a dense tensor. Not a function in a function, which takes five times the memory."""

    path: Path
    entry: Entry

    def __call__(self, first: int = 0, last: int | None = None) -> Blocks:
        entry = self.entry
        if entry.nbytes == 0:
            return
        lines, width = grid_of(entry.shape, entry.dtype)
        step = lines_at_once(width, entry.dtype)
        end = lines if last is None else last
        with self.path.open("rb") as file:
            for line in range(first, end, step):
                taken = min(step, end - line)
                yield line, read_exactly(file, entry, line * width, taken * width).reshape(taken, width)


def _dense(path: Path, entry: Entry) -> Tensor:
    return Tensor(entry.name, entry.dtype, entry.shape, path.name, "dense", entry.nbytes, _Dense(path, entry))


def read_exactly(file: Any, entry: Entry, first: int, count: int) -> Bits:
    """`count` storage units of a stored tensor from unit `first` on, from an open file."""
    storage = DTYPES[entry.dtype].storage
    assert (first + count) * storage.itemsize <= entry.nbytes, f"{entry.name}: read beyond its end"
    check_going_on()
    file.seek(entry.offset + first * storage.itemsize)
    values = np.empty(count, storage)
    try:
        count = file.readinto(values.view(np.uint8).data)
    except OSError as error:
        what = f"{file.name}: {entry.name!r}: {error.strerror}"
        raise InputError(338, what, hint="check the disk that it is on, and run again") from error
    if count != values.nbytes:
        what = f"{file.name}: {entry.name!r}: the file became shorter while it was read"
        raise InputError(333, what, hint="run again when nobody writes it")
    return values


def _open_bitmask(path: Path, header: Header) -> list[Tensor]:
    entries = {entry.name: entry for entry in header.entries}
    tensors: list[Tensor] = []
    for entry in header.entries:
        prefix, _, part = entry.name.rpartition(".")
        if part in bitmask.PARTS and f"{prefix}.bitmask" in entries:
            if part == "bitmask":
                tensors.append(_read_bitmask(path, bitmask.name_of(prefix), entries))
        else:
            tensors.append(_dense(path, entry))
    try:
        order = list(unique_json(header.metadata.get("lpsparse.order", "[]")))
    except (ValueError, TypeError):
        order = []
    places = {str(name): place for place, name in enumerate(order)}
    return sorted(tensors, key=lambda tensor: places.get(tensor.name, len(places)))


def _read_bitmask(path: Path, name: str, entries: dict[str, Entry]) -> Tensor:
    named = zip(bitmask.PARTS, bitmask.stored_names(name), strict=True)
    parts = {part: entries[stored] for part, stored in named if stored in entries}

    def read(part: str, first: int, count: int) -> Bits:
        with path.open("rb") as file:
            return read_exactly(file, parts[part], first, count)

    return bitmask_tensor(name, path.name, bitmask.check(f"{path}: {name!r}", parts, read))


def bitmask_tensor(name: str, file: str, parts: bitmask.Packed, layout: str = "bitmask") -> Tensor:
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


def _open_packed(path: Path, header: Header) -> list[Tensor]:
    """What the manifest in the header lists, no more and no less. Raises InputError."""
    entries = {entry.name: entry for entry in header.entries}
    tensors: list[Tensor] = []
    with path.open("rb") as file:
        for name, described in packed.read_manifest(path, header.metadata).items():
            stored = name if described is None else name + packed.SUFFIX
            entry = entries.pop(stored, None)
            if entry is None:
                what = f"{path}: {stored!r} is missing, its manifest lists it"
                raise InputError(343, what, hint=packed.AGAIN)
            if described is None:
                tensors.append(_dense(path, entry))
            else:
                tensors.append(_packed_tensor(path, file, name, entry, described))
    if entries:
        what = f"{path}: {next(iter(entries))!r} is not in its manifest"
        raise InputError(343, what, hint=packed.AGAIN)
    return tensors


def _packed_tensor(
    path: Path, opened: Any, name: str, entry: Entry, described: tuple[str, tuple[int, ...]]
) -> Tensor:
    """`opened` is the file of `path`, where the head is read from."""

    def read(first: int, count: int) -> Bits:
        with path.open("rb") as file:
            return read_exactly(file, entry, first, count)

    where = f"{path}: {name!r}"
    if (entry.dtype, entry.shape) != ("U8", (entry.nbytes,)):
        what = f"{where}: is stored as {entry.dtype} {entry.shape}, not as one row of bytes"
        raise InputError(343, what, hint=packed.AGAIN)
    found = packed.read_packed(where, entry.nbytes, partial(read_exactly, opened, entry))
    found = replace(found, read=read)
    if (found.dtype, found.shape) != described:
        what = f"{where}: {found.dtype} {found.shape}, its manifest has {described[0]} {described[1]}"
        raise InputError(343, what, hint=packed.AGAIN)

    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        lines, width = grid_of(found.shape, found.dtype)
        step = lines_at_once(width, found.dtype)
        parts = found.values(first * width, (lines if last is None else last) * width)
        for block in regrouped(parts, step * width):
            yield first, block.reshape(-1, width)
            first += block.size // width

    return Tensor(name, found.dtype, found.shape, path.name, "packed", entry.nbytes, blocks)
