"""A layout as a record of LAYOUTS, and what every layout reads and writes with."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpsparse.checkpoint.counting import Count, Cuts, Sums, sums_of
from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import Entry, Header
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Tensor
from lpsparse.errors import InputError
from lpsparse.families import LAYOUTS, RETIRED_LAYOUTS
from lpsparse.parallel.progress import advance
from lpsparse.parallel.threads import check_going_on, parallel_in_order


@dataclass(frozen=True, slots=True)
class Wrote:
    names: tuple[str, ...]  # entries of the file
    sums: Sums  # of the tensors, as they were written
    changed: bool  # whether anything had to be written


@dataclass(frozen=True, slots=True)
class Planned:
    """A weight file as it would be written."""

    stored: dict[str, int]  # bytes of each tensor that is encoded; the others stay as they are
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How one weight file holds its tensors. `write` and `plan` get the file's tensors, what to cut, the
    header's metadata and the level."""

    name: str
    opens_with: str  # programs that open it; `{}` is replaced by the library that config.json names
    open: Callable[[Path, Header], list[Tensor]]  # raises InputError
    write: Callable[[Path, list[Tensor], Cuts, dict[str, str], str], Wrote]
    plan: Callable[[list[Tensor], dict[str, Count], Cuts, dict[str, str], str], Planned]  # for a dry run
    stored_names: Callable[[str], tuple[str, ...]]  # entries that hold an encoded tensor
    names_taken: Callable[[set[str]], list[str]] = lambda _: []  # which a reader would take for such entries
    metadata: Callable[[Iterable[Tensor]], dict[str, str]] = lambda _: {}  # further keys of the header
    is_plain: bool = False  # any safetensors reader opens it, so files keep names that loaders look for
    has_levels: bool = False


@dataclass(frozen=True, slots=True)
class RetiredLayout:
    """A layout of another program that can only be read; `layouts.retired` opens all of them."""

    name: str
    opens_with: str


PACKED_OPENS = "lpsparse (load, unpack){}; ordinary loaders refuse it by its file name"


def layout_of(name: str) -> Layout | RetiredLayout:
    return (RETIRED_LAYOUTS if name in RETIRED_LAYOUTS else LAYOUTS)[name]


def stored_names(tensor: Tensor) -> tuple[str, ...]:
    """The entries of a weight file that hold a tensor."""
    return LAYOUTS[tensor.layout].stored_names(tensor.name)


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


def flow(tensors: list[Tensor], cut: Cuts, sums: Sums) -> Iterator[tuple[Tensor, int, Bits]]:
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
