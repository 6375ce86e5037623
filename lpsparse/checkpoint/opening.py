"""Open a checkpoint: find its weight files and check them, and give their tensors. Reads no weights yet.

Whatever the source (Hugging Face folder, one safetensors file, torch file, index, hub id, bitmask folder),
what comes out is the same: named tensors of raw bits, read a few megabytes at a time.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from lpsparse.checkpoint.finding import (
    check_index,
    check_name,
    find_weights,
    locate,
    named_weights,
    part_of,
    read_index,
    shards_of,
)
from lpsparse.checkpoint.foreign import refuse_adapter, refuse_hollow
from lpsparse.checkpoint.masked import baked
from lpsparse.checkpoint.names import TORCH_FILES, is_index
from lpsparse.checkpoint.stored import open_file, stored_names
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.errors import InputError, UsageError


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


def open_checkpoint(
    model: str | Path, weights: str | None = None, key: str | None = None, *, strict: bool = True
) -> Checkpoint:
    """Open MODEL: a folder, a weight file, an `*.index.json`,
    `bundled:NAME` or a hub id `org/name[@revision]`. `weights` names the file or index meant in a folder,
    `key` the table of tensors in a torch file; other files have none, which is refused if it is `strict`.

    Raises InputError for what is missing, broken or hostile, RemoteError when the hub cannot be reached,
    UsageError when `weights` is no name, or MODEL no folder, and for a `key` that nothing has.
    """
    from lpsparse.checkpoint.rescue import rescued

    check_name(weights)
    try:
        return rescued(_open_located(*locate(model), weights, key, strict=strict))
    except OSError as error:  # of a folder: files have errors of their own
        what = f"{error.filename or model}: {error.strerror or error}"
        raise InputError(305, what, hint="check the path and its permissions") from error


def no_key(name: str, key: str) -> UsageError:
    """For a `key` where there is nothing to choose."""
    return UsageError(261, f"--key {key}: {name} is not a torch file", hint="leave --key out")


def _open_located(
    path: Path, name: str, revision: str | None, weights: str | None, key: str | None, *, strict: bool
) -> Checkpoint:
    if path.is_dir():
        file, root = find_weights(path) if weights is None else named_weights(path, weights), path
    elif weights is not None:
        raise UsageError(
            216,
            f"--weights {weights}: {path.name} is a file already",
            hint="give its folder, or no --weights",
        )
    else:
        file, root = path, path.parent if is_index(path.name) else None
    refuse_adapter(file)
    if is_index(file.name):
        files = read_index(file)
        checkpoint = replace(_open_files(name, root, list(files), files, key), index=file.name)
    else:
        shards = [file] if weights is None else shards_of(file)
        checkpoint = _open_files(name, root, shards, None, key)
    refuse_hollow(name, checkpoint.tensors)
    if key is not None and strict and not checkpoint.is_torch:
        raise no_key(name, key)
    notes = (*checkpoint.notes, *(part_of(file) if root is None else ()))
    return replace(checkpoint, revision=revision, notes=notes)


def _open_files(
    name: str, root: Path | None, files: list[Path], expected: dict[Path, set[str]] | None, key: str | None
) -> Checkpoint:
    tensors: list[Tensor] = []
    metadata: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for path in files:
        found, metadata[path.name], more = open_file(path, key)
        notes += more
        if expected is not None:
            check_index(path, expected[path], {part for tensor in found for part in stored_names(tensor)})
        tensors += found
    seen: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in seen:
            what = f"{tensor.file}: {tensor.name!r} is also in {seen[tensor.name]}"
            raise InputError(331, what, hint="download the checkpoint again")
        seen[tensor.name] = tensor.file
    tensors, more = baked(tensors)
    return Checkpoint(name, root, tuple(files), tuple(tensors), metadata, notes=(*notes, *more))
