"""The one loop of every command that writes a checkpoint:
read a block, cut it (or not), encode it, write it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits, infinity, ordered
from lpsparse.checkpoint.layouts import bitmask
from lpsparse.checkpoint.manifest import FileRecord, digest
from lpsparse.checkpoint.opening import Blocks, Checkpoint, Tensor, open_checkpoint
from lpsparse.checkpoint.threads import of_one, parallel
from lpsparse.checkpoint.writer import (
    Named,
    Part,
    drop_weights,
    weight_file_names,
    write_index,
    write_tensors,
)
from lpsparse.errors import InputError, OutputError

WAITING = 2  # threads that write, more than there are cores
_TASK_BYTES = 32 << 20  # what a thread counts at a time

Sums = dict[str, tuple[int, int]]  # of each tensor, `stored` and `total` of its Count
Cut = Callable[[Blocks], Blocks]  # a stream of blocks in, the same lines out with more zeros


@dataclass(frozen=True, slots=True)
class Written:
    """What is in OUT, as it was read back: in each tensor, and each weight file."""

    counts: dict[str, "Count"]
    files: tuple[FileRecord, ...]
    kept: int = 0  # weight files of an interrupted run that were right as they are


@dataclass(frozen=True, slots=True)
class Count:
    """What is in a tensor, or in some of its lines."""

    zeros: int  # exact zeros of either sign (for integers: zero)
    stored: int  # values that are not the all-zero bit pattern: -0.0 counts
    nonfinite: int
    total: int  # modulo 2**64, the sum of the raw bits of each line (8 bytes a word where lines are made of
    # them) times an odd number of its own: another one shows that bits are others, or elsewhere

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.zeros + other.zeros, self.stored + other.stored, self.nonfinite + other.nonfinite,
            (self.total + other.total) % 2**64,
        )  # fmt: skip


NOTHING = Count(0, 0, 0, 0)


def count_block(line: int, block: Bits, dtype: str) -> Count:
    """Of a block of lines, the first of which has this number."""
    stored, total = sums_of(line, block)
    if not DTYPES[dtype].is_float or _is_plain(block, dtype):
        return Count(block.size - stored, stored, 0, total)
    codes = ordered(block, dtype)
    return Count(block.size - int(np.count_nonzero(codes)), stored, nonfinite(codes, dtype), total)


def sums_of(line: int, block: Bits) -> tuple[int, int]:
    """`stored` and `total` of `Count`."""
    words = block
    if block.shape[-1] * block.itemsize % 8 == 0:
        words = np.ascontiguousarray(block).view(np.uint64)  # of a torch file's view, the block is not
    each = words.sum(axis=1, dtype=np.uint64)
    weights = 2 * np.arange(line, line + len(each), dtype=np.uint64) + 1
    return int(np.count_nonzero(block)), int((each * weights).sum(dtype=np.uint64))


def _is_plain(block: Bits, dtype: str) -> bool:
    """Whether there is no -0, Inf or NaN: of sign and magnitude the extremes tell, without a copy."""
    if not block.size:
        return True
    top, limit = 1 << (8 * block.itemsize - 1), infinity(dtype)
    signed = block.view(f"<i{block.itemsize}")
    return -top < int(signed.min()) and int(signed.max()) < limit and int(block.max()) < top + limit


def count(tensor: Tensor, blocks: Blocks) -> Count:
    return sum((count_block(line, block, tensor.dtype) for line, block in blocks), NOTHING)


def count_all(
    checkpoint: Checkpoint, cut: Callable[[Tensor], Cut | None] = lambda _: None
) -> dict[str, Count]:
    """What is in each tensor, or would be after `cut`."""
    tasks: list[tuple[Tensor, int, int]] = []
    for tensor in checkpoint.tensors:
        whole = cut(tensor) is not None  # it goes from the first line to the last
        tasks += [(tensor, *task) for task in tensor.tasks(tensor.nbytes if whole else _TASK_BYTES)]

    def counted(task: tuple[Tensor, int, int]) -> Count:
        tensor, first, last = task
        apply = cut(tensor)
        return count(tensor, apply(tensor.blocks()) if apply else tensor.blocks(first, last))

    found = {tensor.name: NOTHING for tensor in checkpoint.tensors}
    for (tensor, _, _), each in zip(tasks, parallel(counted, tasks), strict=True):
        found[tensor.name] += each
    return found


def nonfinite(codes: Bits, dtype: str) -> int:
    """How many of some ordered magnitudes are NaN or Inf."""
    limit = infinity(dtype)
    if not codes.size or int(codes.max()) < limit:
        return 0
    return int(np.count_nonzero(codes >= codes.dtype.type(limit)))


def check_finite(source: Checkpoint, tensor: Tensor, bad: int) -> None:
    """Raise InputError when a block has `bad` values that are NaN or Inf."""
    if bad:
        what = f"{source.name}/{tensor.file}: {tensor.name!r}: {bad} values are NaN or Inf"
        raise InputError(334, what, mend="mend the checkpoint; `lpsparse report` lists the tensors")


def rewrite(source: Checkpoint, folder: Path, cut: Callable[[Tensor], Cut | None], layout: str) -> Written:
    """Write `source` into `folder` in `layout` (dense or bitmask), applying `cut`, and read it back.

    Decides nothing. Keeps the source's sharding, and the bytes that an interrupted run left in `folder`
    where they are the same. Raises InputError on NaN or Inf in any float tensor, OutputError when a file
    does not hold what was written.
    """
    names = weight_file_names(source, packed=layout == "bitmask")
    of_one(lambda: drop_weights(folder, but=set(names.values())))

    def written(path: Path) -> tuple[list[Named], dict[str, Count], FileRecord, bool]:
        target = folder / names[path.name]
        found = target.exists()
        entries, sums, changed = _rewrite_file(source, path, target, cut, layout)
        return entries, *_read_back(source, target, sums), found and not changed

    weight_map: dict[str, str] = {}
    counts: dict[str, Count] = {}
    files: list[FileRecord] = []
    kept = 0
    sizes = dict.fromkeys((path.name for path in source.files), 0)
    for tensor in source.tensors:
        sizes[tensor.file] += tensor.nbytes
    found = parallel(written, source.files, waiting=WAITING, size=lambda path: sizes[path.name])
    for entries, counted, record, same in found:
        weight_map |= {name: record.name for name, _, _ in entries}
        counts |= counted
        files.append(record)
        kept += same
    if len(source.files) > 1:
        stem = "lpsparse" if layout == "bitmask" else "model"
        of_one(lambda: write_index(folder, stem, weight_map, source.dense_bytes))
    return Written(counts, tuple(files), kept)


def _read_back(source: Checkpoint, target: Path, sums: Sums) -> tuple[dict[str, Count], FileRecord]:
    """Open a file again that was written, and compare. Raises OutputError; for NaN or Inf InputError."""
    checkpoint = open_checkpoint(target)
    if checkpoint.layout == "dense":
        read, record = _count_and_digest(checkpoint, target)
    else:
        read, record = count_all(checkpoint), digest(target, target.parent)
    for name, written in sums.items():
        found = read.get(name, NOTHING)
        if (found.stored, found.total) != written:
            what = f"{source.name}: {name!r}: {found} read back, {written} (stored, total) written"
            raise OutputError(408, what, mend="check the disk and run again; nothing was kept")
    for tensor in source.tensors:
        if tensor.name in sums:
            check_finite(source, tensor, read[tensor.name].nonfinite)
    return read, record


def _count_and_digest(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, Count], FileRecord]:
    """`count_all` and `digest` of a dense file, read once: its header, then its tensors one after another."""
    size = path.stat().st_size
    with path.open("rb") as file:
        sha256 = hashlib.sha256(file.read(size - checkpoint.dense_bytes))
    counts: dict[str, Count] = {}
    for tensor in checkpoint.tensors:
        counts[tensor.name] = NOTHING
        for line, block in tensor.blocks():
            sha256.update(block.data)
            counts[tensor.name] += count_block(line, block, tensor.dtype)
    return counts, FileRecord(name=path.name, size=size, sha256=sha256.hexdigest())


def _rewrite_file(
    source: Checkpoint, path: Path, target: Path, cut: Callable[[Tensor], Cut | None], layout: str
) -> tuple[list[Named], Sums, bool]:
    """The entries of the new file, the sums of its tensors, and whether anything had to be written."""
    tensors = [tensor for tensor in source.tensors if tensor.file == path.name]
    streams = {tensor.name: _stream(tensor, cut(tensor)) for tensor in tensors}
    sums: Sums = dict.fromkeys(streams, (0, 0))
    packed: dict[str, Count] = {}
    if layout == "bitmask":  # its header says how many values there are
        for tensor in tensors:
            counted = count(tensor, streams[tensor.name]())
            if bitmask.pays(tensor.dtype, tensor.shape, counted.stored):
                packed[tensor.name] = counted
                sums[tensor.name] = counted.stored, counted.total
        taken = [t.name for t in tensors if bitmask.is_taken(t.name, set(packed))]
        if taken:
            what = f"{source.name}/{path.name}: {taken[0]!r}: this name belongs to the bitmask layout"
            raise InputError(342, what, mend="keep this model dense, or rename the tensor")
    entries = [e for t in tensors for e in entries_of(t, packed.get(t.name, NOTHING), t.name in packed)]

    def parts() -> Iterator[Part]:
        for tensor in tensors:
            if tensor.name in packed:
                yield from _packed_parts(tensor, streams[tensor.name]())
                continue
            for line, block in streams[tensor.name]():
                stored, total = sums_of(line, block)
                known = sums[tensor.name]
                sums[tensor.name] = known[0] + stored, (known[1] + total) % 2**64
                yield tensor.name, line * block.shape[1], block

    changed = write_tensors(target, entries, metadata_of(source, path.name, layout), parts())
    return entries, sums, changed


def follow(source: Checkpoint) -> None:
    """Read what `rewrite` to dense reads, in its order, and write nothing: for the processes that only give
    their parts of the tensors."""
    for path in source.files:
        tensors = [tensor for tensor in source.tensors if tensor.file == path.name]
        for tensor in tensors:
            for _ in tensor.blocks():
                pass


def _stream(tensor: Tensor, cut: Cut | None) -> Callable[[], Blocks]:
    return lambda: cut(tensor.blocks()) if cut else tensor.blocks()


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


def _packed_parts(tensor: Tensor, blocks: Blocks) -> Iterator[Part]:
    yield f"{tensor.name}.shape", 0, np.array(tensor.shape, "<i8").view("<u8")
    stored, pieces = 0, tensor.grid[0] // tensor.rows
    for line, block in blocks:
        parts = bitmask.encode(block, stored)
        yield f"{tensor.name}.compressed", stored, parts["compressed"]
        yield f"{tensor.name}.bitmask", line * parts["bitmask"].shape[1], parts["bitmask"]
        begun = -line % pieces  # of pieces of rows, those that begin one
        yield f"{tensor.name}.row_offsets", -(-line // pieces), parts["row_offsets"][begun::pieces]
        stored += parts["compressed"].size
