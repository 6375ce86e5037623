"""The one loop of every command that writes a checkpoint:
read a block, cut it (or not), encode it, write it."""

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from lpsparse.checkpoint.counting import NOTHING, Count, Cuts, Sums, check_finite, count_all, count_block
from lpsparse.checkpoint.files import write_json
from lpsparse.checkpoint.header import json_table
from lpsparse.checkpoint.layouts.base import Layout
from lpsparse.checkpoint.manifest import FileRecord, digest
from lpsparse.checkpoint.names import DIFFUSERS, FOLDER_ORDER
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.checkpoint.tensors import Checkpoint, Tensor
from lpsparse.errors import InputError, OutputError
from lpsparse.families import LAYOUTS
from lpsparse.parallel.progress import phase
from lpsparse.parallel.threads import on_rank_0, parallel

WAITING = 2  # threads that write, more than there are cores


@dataclass(frozen=True, slots=True)
class Written:
    """Counts of each tensor and records of each weight file of OUT, as read back."""

    counts: dict[str, Count]
    files: tuple[FileRecord, ...]
    kept: int = 0  # weight files of an interrupted run that were right as they are


def rewrite(
    source: Checkpoint,
    folder: Path,
    cut: Cuts,
    layout: str,
    *,
    level: str = "default",
    finite: Collection[str] | None = None,
) -> Written:
    """Write `source` into `folder` in one of LAYOUTS, applying `cut`, and read it back.

    Decides nothing. Keeps the source's sharding, and the bytes that an interrupted run left in `folder`
    where they are the same. `finite` are the tensors that may hold no NaN or Inf, all by default: else raises
    InputError; OutputError when a file does not hold what was written.
    """
    to: Layout = LAYOUTS[layout]
    _refuse_taken(source, to)
    names = weight_file_names(source, packed=not to.is_plain)
    on_rank_0(lambda: drop_weights(folder, but=set(names.values())))
    by_file = source.by_file

    def written(path: Path) -> tuple[tuple[str, ...], dict[str, Count], FileRecord, bool]:
        target = folder / names[path.name]
        tensors = by_file[path.name]
        found = target.exists()
        wrote = to.write(target, tensors, cut, metadata_of(source, path.name, layout, tensors), level)
        return (
            wrote.names,
            *_read_back(source, target, tensors, wrote.sums, finite=finite),
            found and not wrote.changed,
        )

    sizes = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in by_file.items()}
    with phase("writing and reading back", 2 * source.dense_bytes):
        found = parallel(written, source.files, waiting=WAITING, size=lambda path: sizes[path.name])
    if len(source.files) > 1:
        weight_map = {entry: record.name for entries, _, record, _ in found for entry in entries}
        index = index_name(source, packed=not to.is_plain)
        on_rank_0(lambda: write_index(folder, index, weight_map, source.dense_bytes))
    on_rank_0(lambda: _check_complete(open_checkpoint(folder), source))
    counts = {name: each for _, counted, *_ in found for name, each in counted.items()}
    return Written(counts, tuple(record for *_, record, _ in found), sum(same for *_, same in found))


def _refuse_taken(source: Checkpoint, to: Layout) -> None:
    taken = to.names_taken({tensor.name for tensor in source.tensors})
    if taken:
        what = f"{source.name}: {taken[0]!r}: this name is reserved by the {to.name} layout"
        raise InputError(342, what, hint="keep this model dense, or rename the tensor")


def _check_complete(written: Checkpoint, source: Checkpoint) -> None:
    """Raises OutputError unless what a reader finds in OUT are the tensors of `source`."""
    there, wanted = (
        {tensor.name: (tensor.dtype, tensor.shape) for tensor in each.tensors} for each in (written, source)
    )
    others = sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name))
    if others:
        what = f"{source.name}: {len(others)} tensors of OUT are not as they were written: {others[0]!r}"
        raise OutputError(408, what, hint="keep this model dense, and report this bug; OUT was not made")


def _read_back(
    source: Checkpoint, target: Path, tensors: list[Tensor], sums: Sums, *, finite: Collection[str] | None
) -> tuple[dict[str, Count], FileRecord]:
    """Open a file again that was written, and compare. Raises OutputError; for NaN or Inf InputError."""
    checkpoint = open_checkpoint(target)
    if LAYOUTS[checkpoint.layout].is_plain:
        read, record = _count_and_digest(checkpoint, target)
    else:
        read, record = count_all(checkpoint), digest(target, target.parent)
    for name, written in sums.items():
        found = read.get(name, NOTHING)
        if (found.stored, found.total) != written:
            what = f"{source.name}: {name!r}: read back {found}, wrote (stored, total) {written}"
            raise OutputError(408, what, hint="check the disk and run again; OUT was not made")
    for tensor in tensors:
        if tensor.name in sums and (finite is None or tensor.name in finite):
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


def follow(source: Checkpoint) -> None:
    """Read what `rewrite` to dense reads, in its order, and write nothing: for the processes that only give
    their parts of the tensors."""
    for tensors in source.by_file.values():
        for tensor in tensors:
            for _ in tensor.blocks():
                pass


def metadata_of(source: Checkpoint, file: str, layout: str, tensors: Iterable[Tensor]) -> dict[str, str]:
    """What the header of a weight file, which holds these, says in `layout`: the source's own, and how to
    read it."""
    metadata = {k: v for k, v in source.metadata[file].items() if not k.startswith("lpsparse.")}
    metadata.setdefault("format", "pt")  # transformers asks for it
    if not LAYOUTS[layout].is_plain:
        metadata |= {"lpsparse.layout": layout, "lpsparse.format_version": "1"}
    return metadata | LAYOUTS[layout].metadata(tensors)


def drop_weights(folder: Path, *, but: set[str]) -> None:
    """Delete the weight files in OUT.partial that an interrupted run of other settings left there."""
    for path in folder.glob("*.safetensors"):
        if path.name not in but:
            path.unlink()


def weight_file_names(source: Checkpoint, *, packed: bool) -> dict[str, str]:
    """Source weight file -> file in OUT.
    Packed files never carry a name that an ordinary loader looks for."""
    names = [path.name for path in source.files]
    if packed:
        if len(names) == 1:
            return {names[0]: "lpsparse.safetensors"}
        return {name: f"lpsparse-{i:05d}-of-{len(names):05d}.safetensors" for i, name in enumerate(names, 1)}
    if len(names) > 1:
        ours = any(name.startswith("lpsparse-") or name in FOLDER_ORDER for name in names)
        if source.index is not None and not ours and all(name.endswith(".safetensors") for name in names):
            return {name: name for name in names}
        stem = _stem(source)
        return {name: f"{stem}-{i:05d}-of-{len(names):05d}.safetensors" for i, name in enumerate(names, 1)}
    if not names[0].endswith(".safetensors") or names[0] == "lpsparse.safetensors":
        return {names[0]: f"{_stem(source)}.safetensors"}
    # One shard of one needs an index to be found; without its number it is found by its name.
    return {names[0]: re.sub(r"-0+1-of-0+1(?=\.safetensors$)", "", names[0])}


def index_name(source: Checkpoint, *, packed: bool) -> str:
    """The name of the index in OUT, of a source with several files: its own, where its files keep theirs."""
    if packed:
        return "lpsparse.safetensors.index.json"
    names = weight_file_names(source, packed=False)
    if source.index is not None and all(old == new for old, new in names.items()):
        return source.index
    return f"{_stem(source)}.safetensors.index.json"


def _stem(source: Checkpoint) -> str:
    """Stem of files in OUT that cannot keep their names: the one that loaders look for."""
    config = {} if source.root is None else json_table(source.root / "config.json")
    of_diffusers = source.files[0].name.startswith(DIFFUSERS) or "_diffusers_version" in config
    return DIFFUSERS if of_diffusers else "model"


def write_index(folder: Path, name: str, weight_map: dict[str, str], total_bytes: int) -> None:
    """The index that Hugging Face loaders read for a sharded checkpoint."""
    table = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / name, table)
