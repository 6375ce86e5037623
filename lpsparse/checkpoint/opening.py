"""Open a checkpoint: check its weight files, and give its tensors as blocks of rows. Reads no weights yet.

Whatever the source (Hugging Face folder, one safetensors file, torch file, index, hub id, bitmask folder),
what comes out is the same: named tensors of raw bits, read a few megabytes at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.finding import (
    check_index,
    check_name,
    find_weights,
    locate,
    named_weights,
    read_index,
)
from lpsparse.checkpoint.header import (
    Entry,
    Header,
    check_regular,
    read_header,
    sniff,
    unique_json,
)
from lpsparse.checkpoint.layouts import bitmask, packed
from lpsparse.checkpoint.names import TORCH_SUFFIXES
from lpsparse.checkpoint.threads import among, check_going_on, parallel
from lpsparse.errors import InputError, UsageError

BLOCK_BYTES = 2 << 20  # lines are read about this much at a time: with the work on it, it stays in the cache
_TRIES = 4096  # numbers of pieces to try for a long row: one of them nearly always divides it

Blocks = Iterator[tuple[int, Bits]]  # (first line, raw bits of shape (lines, width))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as the model sees it, whatever the layout on disk."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    file: str  # weight file it lies in
    layout: str  # dense, bitmask, packed or one of rescue.LAYOUTS
    stored_bytes: int
    blocks: Callable[..., Blocks] = field(repr=False, compare=False)  # of lines (first=0, last=None)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def rows(self) -> int:
        """The first dimension. A 0-dim tensor is one row, and so is one of values under a byte, whose rows
        may share one."""
        return _rows(self.shape, self.dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """What `blocks` counts: (lines, width in storage units). A line is a row, or an equal piece of one
        that is long."""
        return grid_of(self.shape, self.dtype)

    def tasks(self, nbytes: int) -> list[tuple[int, int]]:
        """Ranges of lines of about so many bytes; at least one line each."""
        lines, _ = self.grid
        step = max(1, nbytes * lines // max(self.nbytes, 1))
        return [(line, min(line + step, lines)) for line in range(0, lines, step)]

    @property
    def nbytes(self) -> int:
        """Bytes of the dense form."""
        return self.size * DTYPES[self.dtype].bits // 8

    def read(self) -> Bits:
        """The whole tensor, raw bits in its own shape; of values under a byte the bytes, in one dimension."""
        found = np.empty(self.grid, DTYPES[self.dtype].storage)
        for line, block in self.blocks():
            found[line : line + len(block)] = block
        return found.reshape(self.shape if DTYPES[self.dtype].bits >= 8 else -1)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. `tensors` are in file order, then byte order."""

    name: str  # folder or file name, or hub id: never a path of this machine
    root: Path | None  # folder whose other files are the sidecars; None for a single file
    files: tuple[Path, ...]  # weight files
    tensors: tuple[Tensor, ...]
    metadata: dict[str, dict[str, str]]  # by weight file
    revision: str | None = None
    notes: tuple[str, ...] = ()  # what was unwrapped, dropped or chosen

    @property
    def layout(self) -> str:
        found = {metadata.get("lpsparse.layout") for metadata in self.metadata.values()} - {None}
        return found.pop() or "dense" if found else "dense"

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def open_checkpoint(model: str | Path, weights: str | None = None) -> Checkpoint:
    """Open MODEL: a folder, a weight file, an `*.index.json`,
    `bundled:NAME` or a hub id `org/name[@revision]`. `weights` names the file or index meant in a folder.

    Raises InputError for what is missing, broken or hostile, RemoteError when the hub cannot be reached,
    UsageError when `weights` is no name, or MODEL no folder.
    """
    from lpsparse.checkpoint.rescue import rescued

    check_name(weights)
    try:
        return rescued(_open_located(*locate(model), weights))
    except OSError as error:  # of a folder: files have errors of their own
        what = f"{error.filename or model}: {error.strerror or error}"
        raise InputError(305, what, mend="check the path and its permissions") from error


def read_all(tensors: Iterable[Tensor]) -> list[Bits]:
    """`read` of each, on all threads of this process."""

    def fill(task: tuple[Tensor, Bits, int, int]) -> None:
        tensor, found, first, last = task
        for line, block in tensor.blocks(first, last):
            found[line : line + len(block)] = block

    grids = [(each, np.empty(each.grid, DTYPES[each.dtype].storage)) for each in tensors]
    with among(None):
        parallel(fill, [(*item, *lines) for item in grids for lines in item[0].tasks(BLOCK_BYTES)])
    return [found.reshape(each.shape if DTYPES[each.dtype].bits >= 8 else -1) for each, found in grids]


def _open_located(path: Path, name: str, revision: str | None, weights: str | None) -> Checkpoint:
    if path.is_dir():
        file, root = find_weights(path) if weights is None else named_weights(path, weights), path
    elif weights is not None:
        raise UsageError(
            216,
            f"--weights {weights}: {path.name} is a file already",
            mend="give its folder, or no --weights",
        )
    else:
        file, root = path, path.parent if path.name.endswith(".index.json") else None
    if file.name.endswith(".index.json"):
        files = read_index(file)
        checkpoint = _open_files(name, root, list(files), files)
    else:
        checkpoint = _open_files(name, root, [file], None)
    return replace(checkpoint, revision=revision)


def _open_files(
    name: str, root: Path | None, files: list[Path], expected: dict[Path, set[str]] | None
) -> Checkpoint:
    tensors: list[Tensor] = []
    metadata: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for path in files:
        found, metadata[path.name], more = _open_file(path)
        notes += more
        if expected is not None:
            check_index(path, expected[path], {part for tensor in found for part in _stored_names(tensor)})
        tensors += found
    seen: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in seen:
            what = f"{tensor.file}: {tensor.name!r} is also in {seen[tensor.name]}"
            raise InputError(331, what, mend="download the checkpoint again")
        seen[tensor.name] = tensor.file
    return Checkpoint(name, root, tuple(files), tuple(tensors), metadata, None, tuple(notes))


def _stored_names(tensor: Tensor) -> tuple[str, ...]:
    if tensor.layout == "bitmask":
        return bitmask.stored_names(tensor.name)
    return (tensor.name + (packed.SUFFIX if tensor.layout == "packed" else ""),)


def _open_file(path: Path) -> tuple[list[Tensor], dict[str, str], tuple[str, ...]]:
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    header = read_header(path)
    layout, version = (header.metadata.get(f"lpsparse.{key}") for key in ("layout", "format_version"))
    if layout not in (None, "bitmask", "packed") or version not in (None, "1"):
        what = f"{path}: layout {layout!r}, version {version!r}: written by a newer lpsparse"
        raise InputError(336, what, mend="upgrade lpsparse")
    if layout is not None:
        opened = (_open_bitmask if layout == "bitmask" else _open_packed)(path, header)
        return opened, header.metadata, ()
    dense = [_dense(path, entry) for entry in header.entries]
    return dense, header.metadata, ()


def _open_torch(path: Path) -> tuple[list[Tensor], dict[str, str], tuple[str, ...]]:
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(512)
    for magic in (b"version https://git-lfs", b"<"):
        if head.startswith(magic):
            sniff(path, head)
    from lpsparse.checkpoint.torchfile import read_torch_file  # the one door through which torch comes in

    found = read_torch_file(path)

    def tensor(name: str, dtype: str, raw: Bits) -> Tensor:
        def blocks(first: int = 0, last: int | None = None) -> Blocks:
            if not raw.size:
                return
            lines, width = grid_of(raw.shape, dtype)
            step = max(1, BLOCK_BYTES * lines // raw.nbytes)
            end = lines if last is None else last
            # A view with strides of its own is never copied as a whole.
            values = raw.reshape(-1) if raw.flags.c_contiguous else raw.flat
            for line in range(first, end, step):
                yield line, values[line * width : min(line + step, end) * width].reshape(-1, width)

        return Tensor(name, dtype, raw.shape, path.name, "dense", raw.nbytes, blocks)

    tensors = [tensor(name, *item) for name, item in found.tensors.items()]
    return tensors, {"format": "pt", **found.ties}, found.notes


def _rows(shape: tuple[int, ...], dtype: str) -> int:
    return shape[0] if shape and DTYPES[dtype].bits >= 8 else 1


def grid_of(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """See `Tensor.grid`. Fused experts have rows of hundreds of megabytes, which nobody wants to hold."""
    rows, kind = _rows(shape, dtype), DTYPES[dtype]
    columns = math.prod(shape) * kind.bits // 8 // kind.storage.itemsize // max(rows, 1)
    pieces = _pieces(columns, max(BLOCK_BYTES // kind.storage.itemsize, 8))
    return rows * pieces, columns // pieces


@cache
def _pieces(columns: int, most: int) -> int:
    """In how many equal pieces of at most `most` values a row is divided. A piece is made of whole bytes of a
    mask; a row that no number divides so is one piece."""
    fewest = -(-columns // most)
    tries = range(fewest, fewest + _TRIES)
    return 1 if fewest < 2 or columns % 8 else next((n for n in tries if columns // 8 % n == 0), 1)


def _dense(path: Path, entry: Entry) -> Tensor:
    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        if entry.nbytes == 0:
            return
        lines, width = grid_of(entry.shape, entry.dtype)
        step = max(1, BLOCK_BYTES * lines // entry.nbytes)
        end = lines if last is None else last
        with path.open("rb") as file:
            for line in range(first, end, step):
                taken = min(step, end - line)
                yield line, read_exactly(file, entry, line * width, taken * width).reshape(taken, width)

    return Tensor(entry.name, entry.dtype, entry.shape, path.name, "dense", entry.nbytes, blocks)


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
        raise InputError(338, what, mend="check the disk that it is on, and run again") from error
    if count != values.nbytes:
        what = f"{file.name}: {entry.name!r}: the file became shorter while it was read"
        raise InputError(333, what, mend="run again when nobody writes it")
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
        step = max(1, BLOCK_BYTES // max(width * DTYPES[parts.dtype].bits // 8, 1))
        for row in range(first, end, step):
            yield row, parts.decode(row, min(end, row + step))

    return Tensor(name, parts.dtype, parts.shape, file, layout, parts.stored_bytes, blocks)


def _open_packed(path: Path, header: Header) -> list[Tensor]:
    """What the manifest in the header lists, no more and no less. Raises InputError."""
    entries = {entry.name: entry for entry in header.entries}
    tensors: list[Tensor] = []
    for name, described in packed.read_manifest(path, header.metadata).items():
        stored = name if described is None else name + packed.SUFFIX
        entry = entries.pop(stored, None)
        if entry is None:
            what = f"{path}: {stored!r} is missing, its manifest lists it"
            raise InputError(343, what, mend="copy the file again, or pack the model again")
        tensors.append(
            _dense(path, entry) if described is None else _packed_tensor(path, name, entry, described)
        )
    if entries:
        what = f"{path}: {next(iter(entries))!r} is not in its manifest"
        raise InputError(343, what, mend="copy the file again, or pack the model again")
    return tensors


def _packed_tensor(path: Path, name: str, entry: Entry, described: tuple[str, tuple[int, ...]]) -> Tensor:
    def read(first: int, count: int) -> Bits:
        with path.open("rb") as file:
            return read_exactly(file, entry, first, count)

    where = f"{path}: {name!r}"
    if (entry.dtype, entry.shape) != ("U8", (entry.nbytes,)):
        what = f"{where}: is stored as {entry.dtype} {entry.shape}, not as one row of bytes"
        raise InputError(343, what, mend="copy the file again, or pack the model again")
    found = packed.read_packed(where, entry.nbytes, read)
    if (found.dtype, found.shape) != described:
        what = f"{where}: {found.dtype} {found.shape}, its manifest has {described[0]} {described[1]}"
        raise InputError(343, what, mend="copy the file again, or pack the model again")

    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        lines, width = grid_of(found.shape, found.dtype)
        step = max(1, BLOCK_BYTES * lines // max(lines * width * DTYPES[found.dtype].storage.itemsize, 1))
        parts = found.values(first * width, (lines if last is None else last) * width)
        for block in regrouped(parts, step * width):
            yield first, block.reshape(-1, width)
            first += block.size // width

    return Tensor(name, found.dtype, found.shape, path.name, "packed", entry.nbytes, blocks)


def regrouped(parts: Iterable[Bits], size: int) -> Iterator[Bits]:
    """The same values, in one dimension, `size` at a time; the last ones may be fewer."""
    held: list[Bits] = []
    count = 0
    for part in parts:
        while part.size:
            taken = part[: size - count]
            part = part[taken.size :]
            held.append(taken)
            count += taken.size
            if count == size:
                yield np.concatenate(held) if len(held) > 1 else taken
                held, count = [], 0
    if held:
        yield np.concatenate(held)
