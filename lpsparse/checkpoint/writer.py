"""The files of a checkpoint that is written, beside its weights: their names, and text that is on the disk
when a call is over."""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.components import components_in
from lpsparse.checkpoint.header import json_table
from lpsparse.checkpoint.names import DIFFUSERS, FOLDER_ORDER, WEIGHT_SUFFIXES, as_left, is_index, is_part
from lpsparse.checkpoint.opening import Checkpoint
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
    """What files in OUT are called that cannot keep their names: as loaders look for them."""
    config = {} if source.root is None else json_table(source.root / "config.json")
    of_diffusers = source.files[0].name.startswith(DIFFUSERS) or "_diffusers_version" in config
    return DIFFUSERS if of_diffusers else "model"


def write_index(folder: Path, name: str, weight_map: dict[str, str], total_bytes: int) -> None:
    """The index that Hugging Face loaders read for a sharded checkpoint."""
    table = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / name, table)


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
    """What `copy_sidecars` copies, with the name that it gets, and what it leaves behind."""
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
            405, f"{path}: is read, or lies inside a checkpoint", hint="choose a file outside of it"
        )
    if path.exists() and (not path.is_file() or path.suffix in FOREIGN_WEIGHTS):
        raise OutputError(401, f"{path}: exists and is no report", hint="choose another file, such as x.json")


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
