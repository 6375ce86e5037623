"""Open a checkpoint: find its weight files, check them, and give their tensors. Reads no weights yet.

Whatever the source (Hugging Face folder, safetensors file, torch file, index, hub id, packed folder), the
result is the same: named tensors of raw bits, read a few megabytes at a time.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.foreign import (
    baked,
    refuse_adapter,
    refuse_archive,
    refuse_hollow,
    refuse_parts,
    refuse_whole,
)
from lpsparse.checkpoint.header import MAX_HEADER_BYTES, check_regular, read_header, sniff, unique_json
from lpsparse.checkpoint.hub import fetch, is_hub_id
from lpsparse.checkpoint.layouts.base import stored_names
from lpsparse.checkpoint.layouts.retired import rescued
from lpsparse.checkpoint.names import (
    FOLDER_ORDER,
    TORCH_FILES,
    WEIGHT_SUFFIXES,
    find_weight_names,
    is_index,
    set_of,
    whole_sets,
)
from lpsparse.checkpoint.tensors import Checkpoint, Tensor
from lpsparse.errors import InputError, RemoteError, UsageError
from lpsparse.families import LAYOUTS

_NAME_IT = "choose one with --weights NAME, or give that file instead of the folder"
_INDEX_AGAIN = "download the checkpoint again"


def open_checkpoint(
    model: str | Path, weights: str | None = None, key: str | None = None, *, strict: bool = True
) -> Checkpoint:
    """Open MODEL: a folder, a weight file, an `*.index.json`,
    `bundled:NAME` or a hub id `org/name[@revision]`. `weights` names the file or index meant in a folder,
    `key` the table of tensors in a torch file; other files have none, which is refused if it is `strict`.

    Raises InputError for what is missing, broken or hostile, RemoteError when the hub cannot be reached,
    UsageError when `weights` is no name, or MODEL no folder, and for a `key` that nothing has.
    """
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


def open_file(path: Path, key: str | None = None) -> tuple[list[Tensor], dict[str, str], tuple[str, ...]]:
    """Tensors, metadata and notes of one weight file. `key` names the table of tensors in a torch file."""
    if path.suffix != ".safetensors":
        refuse_archive(path)
    if path.suffix in TORCH_FILES:
        with path.open("rb") as file:
            head = file.read(512)
        if head.startswith((b"version https://git-lfs", b"<")):
            sniff(path, head)
        from lpsparse.checkpoint.torchfile import open_torch_file  # the one door through which torch comes in

        return open_torch_file(path, key)
    header = read_header(path)
    layout, version = (header.metadata.get(f"lpsparse.{each}") for each in ("layout", "format_version"))
    if layout not in (None, *LAYOUTS) or version not in (None, "1"):
        what = f"{path}: layout {layout!r}, version {version!r}: written by a newer lpsparse"
        raise InputError(336, what, hint="upgrade lpsparse")
    return LAYOUTS[layout or "dense"].open(path, header), header.metadata, ()


def locate(model: str | Path) -> tuple[Path, str, str | None]:
    """Local path, display name and hub commit (None when local) of MODEL, without opening anything."""
    text = str(model)
    path = Path(text)
    if not text.strip():
        raise InputError(
            327, "MODEL is empty", hint="give a folder, a file or a hub id; is a variable unset?"
        )
    if text.startswith("bundled:"):
        folder = Path(__file__).parents[1] / "bundled"
        if text.removeprefix("bundled:") in os.listdir(folder):
            return folder / text.removeprefix("bundled:"), text, None
        raise InputError(326, f"{text}: no such bundled model", hint="try bundled:stories260k")
    if os.path.lexists(path):
        return path, path.resolve().name if path.exists() else path.name, None  # a link loop has no end
    near = _nearest(path)
    if is_hub_id(text):
        local = "a local folder instead (`run`: --set model=FOLDER)"
        try:
            folder, commit = fetch(text, replace_with=local)
        except RemoteError as error:
            error.hint = error.hint if near is None else f"did you mean {near}? Else {error.hint}"
            raise
        return folder, text.partition("@")[0], commit
    hint = "check the path (`run`: --set model=PATH)" if near is None else f"did you mean {near}?"
    if near is None and re.fullmatch(r"[\w.-]+", text):
        hint = f"check the path; a hub id begins with its owner: org/{text}"
    raise InputError(327, f"{text}: no such file or folder", hint=hint)


def _nearest(path: Path) -> Path | None:
    """A folder or weight file with a similar path, for a path that does not exist; None without one."""
    from difflib import get_close_matches

    try:
        if not path.parent.is_dir():
            parent = _nearest(path.parent) if path.parent != path else None
            other = None if parent is None else parent / path.name
            return other if other is None or other.exists() else _nearest(other)
        ends = (*WEIGHT_SUFFIXES, ".index.json")
        beside = [item.name for item in path.parent.iterdir() if item.name.endswith(ends) or item.is_dir()]
    except OSError:  # closed to us
        return None
    near = get_close_matches(path.name, beside, n=1)
    return path.parent / near[0] if near else None


def find_weights(folder: Path) -> Path:
    """The index or weight file in a folder. Raises InputError where there is none, or more than one."""
    names = os.listdir(folder)
    choice = find_weight_names(names)
    refuse_whole(folder, names, choice)
    if len(choice) != 1:
        refuse_parts(folder, names, within=not choice)
    if len(choice) > 1:
        indexed = choice[0] in FOLDER_ORDER or is_index(choice[0])
        what = "two checkpoints here" if indexed else "several weight files and no index"
        whole = [] if indexed else whole_sets(names)
        hint = _open_all(whole[0]) if whole else _NAME_IT
        raise InputError(328, f"{folder}: {what}: {', '.join(choice[:4])}", hint=hint)
    if not choice:
        hint = "give a folder with model.safetensors or an index"
        raise InputError(329, f"{folder}: no weight file here", hint=hint)
    return folder / choice[0]


def named_weights(folder: Path, name: str) -> Path:
    """The weight file of that name. Raises InputError if it is missing."""
    if not os.path.lexists(folder / name):
        names = sorted(path.name for path in folder.iterdir())
        there = ", ".join([each for each in names if each.endswith(WEIGHT_SUFFIXES) or is_index(each)][:8])
        what = f"{folder}: no {name} here, only {there or 'no weights at all'}"
        raise InputError(329, what, hint="give one of these as --weights")
    return folder / name


def check_name(weights: str | None) -> None:
    """Raises UsageError for a path instead of a name."""
    if weights is not None and not _is_bare(weights):
        raise UsageError(216, f"--weights {weights}: a name in MODEL, not a path", hint="give the name alone")


def _is_bare(name: str) -> bool:
    """Whether it is a bare file name on every system, not a path."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")


def read_index(path: Path) -> dict[Path, set[str]]:
    """Weight file -> names of its tensors. Raises InputError also where a file is missing."""
    if check_regular(path) > MAX_HEADER_BYTES:
        raise InputError(330, f"{path}: larger than {MAX_HEADER_BYTES} bytes", hint=_INDEX_AGAIN)
    files = parse_index(path, path.read_bytes())
    lost = [shard for shard in files if not os.path.exists(shard)]  # Path.exists raises for a name too long
    if lost:
        more = f", as are {len(lost) - 1} others" if len(lost) > 1 else ""
        what = f"{path}: shard {lost[0].name!r} with {len(files[lost[0]])} tensors is missing{more}"
        others = set(os.listdir(path.parent)) - {shard.name for shard in files}
        for whole in whole_sets(others):
            what += f"; the index is out of date: all {len(whole)} shards of another set are here"
            raise InputError(330, what, hint=_open_all(whole))
        raise InputError(330, what, hint=_INDEX_AGAIN)
    return files


def part_of(file: Path) -> tuple[str, ...]:
    """A note where a file is one of several shards, which is opened alone."""
    count = len(set_of(file.name))
    return (f"one of {count} shards: the others are not read",) if count > 1 else ()


def _open_all(shards: list[str]) -> str:
    return f"give the folder with --weights {shards[0]}, which opens all {len(shards)} of that set"


def shards_of(file: Path) -> list[Path]:
    """The file, and all other shards where it is one of several: alone it is a part of a model. Raises
    InputError where one of them is missing."""
    shards = [file.parent / name for name in set_of(file.name)]
    for shard in shards:
        if not os.path.exists(shard):
            what = f"{file}: is one of {len(shards)} shards, and {shard.name} is missing"
            raise InputError(330, what, hint=_INDEX_AGAIN)
    return shards


def parse_index(path: Path, text: bytes) -> dict[Path, set[str]]:
    """Weight file -> names of its tensors, sorted. Only bare file names beside the index are believed."""

    def refuse(why: str, hint: str = _INDEX_AGAIN) -> InputError:
        return InputError(330, f"{path}: {why}", hint=hint)

    sniff(path, text[:512])
    try:
        table: Any = unique_json(text)
    except ValueError as error:
        raise refuse(f"not valid JSON: {error}") from None
    weight_map: Any = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("has no weight_map")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_bare(name):
            raise refuse(f"{tensor!r}: shard {name!r} points outside the model folder", "repair the index")
        files.setdefault(path.parent / name, set()).add(tensor)
    return dict(sorted(files.items()))


def check_index(path: Path, expected: set[str], found: set[str]) -> None:
    """Raises InputError where a weight file does not hold the tensors that the index says, and no others."""
    for names, what in (
        (expected - found, "in the index but not in"),
        (found - expected, "not in the index but in"),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise InputError(
                332, f"{path}: {len(names)} tensors {what} this shard: {first}", hint="repair the index"
            )
