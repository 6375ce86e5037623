"""Check from files alone that a folder matches its manifest, and its source except for zeros."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lpsparse.checkpoint.counting import count_all
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.files import MANIFEST
from lpsparse.checkpoint.manifest import TensorRecord, digest, list_files, own_manifest, read_manifest
from lpsparse.checkpoint.names import is_hidden
from lpsparse.checkpoint.open import Checkpoint, open_checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Tensor
from lpsparse.errors import InputError
from lpsparse.parallel.progress import HASHED, advance, phase
from lpsparse.parallel.threads import parallel
from lpsparse.reporting.matching import match
from lpsparse.reporting.records import Report


def check_folder(folder: Path) -> dict[str, Any]:
    """Files, hashes, zero counts and finiteness: {"ok", "files", "tensors", "problems"}.

    Raises InputError when `folder` has no manifest that can be read.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    listed = {record.name: record for record in manifest.files}
    if len(listed) < len(manifest.files):
        problems.append(f"the manifest has {len(manifest.files) - len(listed)} files twice")
    present = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    missing = [name for name in set(listed) - set(present) if not is_hidden(name)]  # `push` leaves these
    problems += [f"{name}: missing" for name in sorted(missing)]
    extra = [name for name in set(present) - set(listed) if name[0] != "."]  # .git, .cache: a download's own
    problems += [f"{name}: not in the manifest" for name in sorted(extra)]
    both = sorted(set(listed) & set(present))
    with phase("hashing", sum(present[name].stat().st_size for name in both), HASHED):
        digests = parallel(lambda name: digest(present[name], folder), both)
    for name, found in zip(both, digests, strict=True):
        if found != listed[name]:
            problems.append(
                f"{name}: {found.size} bytes, sha256 {found.sha256[:12]}, the manifest has "
                f"{listed[name].size} bytes, {listed[name].sha256[:12]}"
            )
    problems += _tensor_problems(folder, manifest.layout, manifest.tensors)
    return {"ok": not problems, "files": len(both), "tensors": len(manifest.tensors), "problems": problems}


def check_weights(checkpoint: Checkpoint, found: Report | None = None) -> None:
    """Raise InputError where a weight file is not the one in the manifest beside it, naming the tensor whose
    zeros, as they were `found`, are others. A checkpoint that lpsparse did not write has none."""
    manifest, root = own_manifest(checkpoint), checkpoint.root
    if manifest is None or root is None:
        return
    files = {record.name: record for record in manifest.files}
    zeros = {record.name: record.zeros for record in manifest.tensors}
    rows = {row.name: row for row in found.tensors} if found else {}
    with phase("hashing", checkpoint.file_bytes, HASHED):
        digests = parallel(lambda path: digest(path, root), checkpoint.files)
    for path, read in zip(checkpoint.files, digests, strict=True):
        if read != files.get(path.name):
            others = [
                f"{name!r}: {rows[name].zeros} zeros, {zeros.get(name, 'none of that name')} there"
                for name in (tensor.name for tensor in checkpoint.tensors if tensor.file == path.name)
                if name in rows and rows[name].zeros != zeros.get(name)
            ]
            why = others[0] if others else "as many zeros, other bytes" if found else "other bytes"
            what = f"{path}: is not what {MANIFEST} describes: {why}"
            hint = f"copy or write it again (if you changed it on purpose, delete {MANIFEST})"
            raise InputError(352, what, hint=hint)


def check_against(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Where `checkpoint` is more than `source` with zeros: names (but for one prefix), shapes, dtypes, and
    values that are neither the source's bits nor +0."""
    names = match(checkpoint, source).names
    theirs = {names[tensor.name]: tensor for tensor in source.tensors if tensor.name in names}
    ours = {tensor.name: tensor for tensor in checkpoint.tensors}
    lost = {tensor.name for tensor in source.tensors} - set(names)
    yield from (f"{name}: not in {source.name}" for name in sorted(set(ours) - set(theirs)))
    yield from (f"{name}: missing, {source.name} has it" for name in sorted(lost))
    tasks: list[tuple[Tensor, Tensor, int, int]] = []
    for name in sorted(theirs):
        mine, base = ours[name], theirs[name]
        if (mine.dtype, mine.shape) != (base.dtype, base.shape):
            yield f"{name}: {mine.dtype} {mine.shape}, {source.name} has {base.dtype} {base.shape}"
        else:
            tasks += [(mine, base, *lines) for lines in mine.tasks(BLOCK_BYTES)]
    others: dict[str, int] = {}
    with phase("comparing", checkpoint.dense_bytes):
        counts = parallel(_others, tasks)
    for (mine, *_), count in zip(tasks, counts, strict=True):
        others[mine.name] = others.get(mine.name, 0) + count
    for name, count in others.items():
        if count:
            yield f"{name}: {count} values are neither those of {source.name} nor 0"


def _others(task: tuple[Tensor, Tensor, int, int]) -> int:
    mine, base, first, last = task
    if not mine.size:
        return 0
    pairs = zip(mine.blocks(first, last), base.blocks(first, last), strict=True)
    may_be_zero = DTYPES[mine.dtype].is_float
    advance((last - first) * mine.nbytes // mine.grid[0])
    return sum(int(np.count_nonzero((a != b) & ((a != 0) | (not may_be_zero)))) for (_, a), (_, b) in pairs)


def _tensor_problems(folder: Path, layout: str, records: tuple[TensorRecord, ...]) -> Iterator[str]:
    try:
        checkpoint = open_checkpoint(folder)
        found = count_all(checkpoint)
        counts = {tensor.name: (tensor, found[tensor.name]) for tensor in checkpoint.tensors}
    except InputError as error:
        yield error.what
        return
    if checkpoint.layout != layout:
        yield f"the layout is {checkpoint.layout}, the manifest has {layout}"
    for record in records:
        tensor, counted = counts.pop(record.name, (None, None))
        if tensor is None or counted is None:
            yield f"{record.name}: tensor missing"
        elif (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            yield f"{record.name}: {tensor.dtype} {tensor.shape}, expected {record.dtype} {record.shape}"
        elif counted.zeros != record.zeros:
            yield f"{record.name}: {counted.zeros} zeros, the manifest has {record.zeros}"
        elif DTYPES[tensor.dtype].is_float and (counted.nonfinite == 0) != record.finite:
            yield f"{record.name}: {counted.nonfinite} values are NaN or Inf, the manifest has " + (
                "none" if record.finite else "some"
            )
        elif tensor.layout != record.layout:
            yield f"{record.name}: stored {tensor.layout}, the manifest has {record.layout}"
    yield from (f"{name}: tensor not in the manifest" for name in counts)
