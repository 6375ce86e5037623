"""The files of a checkpoint that is written, beside its weights: their names, and text that is on the disk
when a call is over."""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.names import WEIGHT_SUFFIXES, as_left, components_in, is_index, is_part
from lpsparse.checkpoint.tensors import Checkpoint
from lpsparse.errors import OutputError

MANIFEST = "lpsparse.json"
REPORT = "report.json"
CARD = "README.md"
METRICS = "metrics.jsonl"
BASE_CARD = "README.base.md"  # the source's own card in OUT
STATE = ".lpsparse-state"  # folder in OUT.partial of an unfinished run's training states
OURS = (MANIFEST, REPORT, METRICS)  # of an earlier run on the source: never carried over
OWNER = ".lpsparse-owner.json"
REPLACED = (
    ".lpsparse-replaced"  # in an OUT that is being exchanged: only such an OUT.old is put back or deleted
)
_MOST_MODULES_BYTES = 1_000_000
_AT_ONCE = 1 << 20  # letters
# Weights in formats that we do not rewrite: a loader would prefer them to ours, so they stay behind.
FOREIGN_WEIGHTS = (
    *WEIGHT_SUFFIXES,
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".tflite",
    ".npz",
    ".ckpt",
    ".pkl",
)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_sidecars(source: Checkpoint, folder: Path, but: Collection[str] = ()) -> tuple[str, ...]:
    """Copy what else is a part of the model, byte for byte, `but` the folders of these names; returns what is
    left behind, by name.

    The source's README.md becomes README.base.md. Links to folders, and links out of a local model folder,
    stay behind; those of a snapshot in the hub's cache lead to its own blobs and are followed.
    """
    found, left = find_sidecars(source, but)
    for path, name in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        fsync(folder / name)
    for path in folder.rglob("*"):  # a name is durable when its folder is
        if path.is_dir():
            fsync(path)
    return left


def find_sidecars(
    source: Checkpoint, but: Collection[str] = ()
) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """The files that `copy_sidecars` copies, with their names in OUT; and the names of those that stay."""
    if source.root is None:
        return [], ()
    found: list[tuple[Path, str]] = []
    left: list[str] = []
    root = source.root.resolve()
    within = next((each for each in (root, *root.parents) if each.parent.name == "snapshots"), None)
    blobs = root if within is None else within.parents[1] / "blobs"  # of the hub's cache
    used, modules = {path.name for path in source.files}, _modules(source.root)
    ours = (source.root / MANIFEST).is_file()  # then README.md is our card, and the base's is README.base.md
    for path in sorted(source.root.rglob("*")):
        relative = path.relative_to(source.root)
        folders = relative.parts if path.is_dir() else relative.parts[:-1]
        if any(part.startswith(".") for part in folders) or relative.parts[0] in but:
            continue
        if path.is_dir():
            if path.is_symlink():
                left.append(f"{relative.as_posix()} (a link to a folder)")
            elif not os.access(path, os.R_OK | os.X_OK):  # a copy would lack what is in it
                found.append((path, relative.as_posix()))
            continue
        if not path.is_file():
            left.append(f"{relative.as_posix()} (no file)")
            continue
        outside = not {root, blobs} & set(path.resolve().parents)
        if outside and source.revision is None:  # that of a hub id is huggingface_hub's own
            left.append(f"{relative.as_posix()} (a link out of the folder)")
        elif relative.parent.as_posix() not in modules and (
            path.suffix in FOREIGN_WEIGHTS or is_index(path.name)
        ):
            if relative.as_posix() not in used and not path.name.endswith(".json"):
                left.append(as_left(relative.as_posix()))
        elif len(relative.parts) > 1 or path.name not in (*OURS, OWNER, REPLACED, CARD, BASE_CARD):
            if is_part(relative.as_posix()):
                found.append((path, relative.as_posix()))
            else:
                left.append(as_left(relative.as_posix()))
        elif path.name == (BASE_CARD if ours or not (source.root / CARD).is_file() else CARD):
            found.append((path, BASE_CARD if source.files else CARD))  # no card of ours beside no weights
        elif not ours:  # somebody else's, where ours is to be
            left.append(relative.as_posix())
    return found, tuple(dict.fromkeys(left))


def _modules(root: Path) -> set[str]:
    """Folders whose weights are in no other file: the components of a diffusers pipeline, and of a
    sentence-transformers model its modules behind the transformer, such as 2_Dense."""
    if parts := components_in(root):
        return set(parts)
    path = root / "modules.json"
    if not path.is_file() or path.stat().st_size > _MOST_MODULES_BYTES:
        return set()
    try:
        table: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return set()  # it is copied as it is
    items: list[Any] = table if isinstance(table, list) else []
    names = (each.get("path") for each in items if isinstance(each, dict))
    return {name for name in names if isinstance(name, str)} - {"", "."}


def write_json(path: Path, value: object) -> None:
    """JSON with a fixed form, durable: the same value gives the same bytes; NaN is refused."""
    write_text(path, as_json(value))


def as_json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_report_file(path: Path, models: Iterable[str | None]) -> None:
    """Raises OutputError where a report would replace a part of a checkpoint."""
    target = path.resolve()
    inputs = [Path(model).resolve() for model in models if model is not None]
    inside = any(each == target or (each.is_dir() and each in target.parents) for each in inputs)
    if inside or (target.parent / MANIFEST).exists():
        raise OutputError(
            405, f"{path}: is an input, or lies inside a checkpoint", hint="choose a file outside of it"
        )
    if path.exists() and (not path.is_file() or path.suffix in FOREIGN_WEIGHTS):
        raise OutputError(
            401, f"{path}: exists and is not a report", hint="choose another file, such as x.json"
        )


def write_beside(path: Path, text: str) -> None:
    """`write_text` so that `path` is never half a file. Raises OutputError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # a name that nobody else's file has
    try:
        write_text(partial, text)
        partial.replace(path)
    except OSError as error:
        raise OutputError(409, f"{path}: {error.strerror}", hint="choose another file") from error
    finally:
        partial.unlink(missing_ok=True)


def replace_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of a folder anew: all beside the old ones first, then renamed in this order. Raises
    OutputError."""
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in texts}
    try:
        for name, text in texts.items():
            write_text(partial[name], text)
        for name, path in partial.items():
            path.replace(folder / name)
        fsync(folder)
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror}"
        raise OutputError(404, what, hint="make the folder writable, or save in a copy of it") from error
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for first in range(0, len(text), _AT_ONCE):
            file.write(text[first : first + _AT_ONCE])  # each time its bytes are held beside it
        file.flush()
        os.fsync(file.fileno())
