"""A checkpoint and its tensors, whatever the layout: raw bits, a few megabytes of lines at a time."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.names import TORCH_FILES
from lpsparse.parallel.threads import parallel, sharing_with

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
    layout: str  # a name of LAYOUTS or RETIRED_LAYOUTS
    stored_bytes: int
    blocks: Callable[..., Blocks] = field(repr=False, compare=False)  # of lines (first=0, last=None)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

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

    def read_rows(self, first: int, last: int) -> Bits:
        """Rows first..last of the first dimension, raw bits in their own shape; only what holds them is
        read. Raises IndexError where there are none such."""
        if not 0 <= first <= last <= self.rows:
            raise IndexError(f"{self.name}: rows {first}..{last}, there are {self.rows}")
        pieces = self.grid[0] // max(self.rows, 1)
        blocks = [block.reshape(-1) for _, block in self.blocks(first * pieces, last * pieces)]
        empty = np.zeros(0, DTYPES[self.dtype].storage)
        return np.concatenate([empty, *blocks]).reshape(last - first, *self.shape[1:])

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
    index: str | None = None  # name of the file that lists the shards
    notes: tuple[str, ...] = ()  # what was unwrapped, dropped or chosen
    _by_name: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False, compare=False)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name. Raises KeyError."""
        if not self._by_name:
            self._by_name.update({tensor.name: tensor for tensor in self.tensors})
        return self._by_name[name]

    @property
    def layout(self) -> str:
        found = {metadata.get("lpsparse.layout") for metadata in self.metadata.values()} - {None}
        return found.pop() or "dense" if found else "dense"

    @property
    def is_torch(self) -> bool:
        """Whether it lies in torch files."""
        return any(path.suffix in TORCH_FILES for path in self.files)

    @property
    def by_file(self) -> dict[str, list[Tensor]]:
        """The tensors of each weight file, by its name."""
        found: dict[str, list[Tensor]] = {path.name: [] for path in self.files}
        for tensor in self.tensors:
            found[tensor.file].append(tensor)
        return found

    @property
    def dense_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


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


def lines_at_once(width: int, dtype: str) -> int:
    """How many lines of this width are about BLOCK_BYTES; at least one."""
    return max(1, BLOCK_BYTES // max(width * DTYPES[dtype].storage.itemsize, 1))


def read_all(tensors: Iterable[Tensor]) -> list[Bits]:
    """`read` of each, on all threads of this process."""

    def fill(task: tuple[Tensor, Bits, int, int]) -> None:
        tensor, found, first, last = task
        for line, block in tensor.blocks(first, last):
            found[line : line + len(block)] = block

    grids = [(each, np.empty(each.grid, DTYPES[each.dtype].storage)) for each in tensors]
    with sharing_with(None):
        parallel(fill, [(*item, *lines) for item in grids for lines in item[0].tasks(BLOCK_BYTES)])
    return [found.reshape(each.shape if DTYPES[each.dtype].bits >= 8 else -1) for each, found in grids]


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
