"""The files of a checkpoint that is written: their names, and bytes that are on the disk when a call is
over."""

import ctypes
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import Entry
from lpsparse.checkpoint.names import WEIGHT_SUFFIXES
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.errors import OutputError

MANIFEST = "lpsparse.json"
REPORT = "report.json"
CARD = "README.md"
METRICS = "metrics.jsonl"
_BASE_CARD = "README.base.md"  # the source's own card in OUT
_AHEAD = 16 << 20  # bytes that are written before the disk is set to work
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2)
STATE = ".lpsparse-state"  # folder in OUT.partial of an unfinished run's training states
OURS = (MANIFEST, REPORT, METRICS)  # of an earlier run on the source: never carried over
OWNER = ".lpsparse-owner.json"
REPLACED = (
    ".lpsparse-replaced"  # in an OUT that is being exchanged: only such an OUT.old is put back or deleted
)
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

Named = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
Part = tuple[str, int, Bits]  # name, first storage unit, values


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WeightFile:
    """A safetensors file that is written: bytes after the header at any place, each once, the header last, in
    the `room` that was left for it. Of a file that is there already, only what is others is written."""

    def __init__(self, path: Path, room: int) -> None:
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._room = room
        self._given = 0
        self.changed = False  # whether anything had to be written

    def put(self, place: int, values: Bits) -> None:
        """`place` in bytes after the header."""
        self.changed |= _put(self._file, self._size, 8 + self._room + place, values)
        if self._given // _AHEAD < (self._given + values.nbytes) // _AHEAD:
            _begin_writing(self._file)
        self._given += values.nbytes

    def finish(self, text: bytes, nbytes: int) -> None:
        """Write the header before its `nbytes`, and have the disk hold it all."""
        length = self._room.to_bytes(8, "little")
        text = text.ljust(self._room)
        assert len(text) == self._room, f"a header of {len(text)} bytes in a room of {self._room}"
        self.changed |= _put(self._file, self._size, 0, np.frombuffer(length + text, np.uint8))
        if self._file.seek(0, os.SEEK_END) != 8 + self._room + nbytes:
            self._file.truncate(8 + self._room + nbytes)
        self.changed |= self._size != 8 + self._room + nbytes
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_tensors(path: Path, tensors: list[Named], metadata: dict[str, str], parts: Iterable[Part]) -> bool:
    """Write one safetensors file from a stream of parts, each placed by name and first storage unit; where
    there is a file already, only what is not in it. Whether anything had to be written.

    Memory is two parts. Every byte must be given exactly once: less is our own bug and asserts.
    """
    places = place(tensors)
    text = header_text(places, metadata)
    offsets = {each.name: (each.offset, DTYPES[each.dtype].storage.itemsize) for each in places}
    nbytes, given = sum(each.nbytes for each in places), 0
    with WeightFile(path, len(text)) as file:
        for name, first, values in parts:
            start, itemsize = offsets[name]
            file.put(start + first * itemsize, values)
            given += values.nbytes
        assert given == nbytes, f"{path.name}: {given} of {nbytes} bytes were given"
        file.finish(text, nbytes)
    return file.changed


def _put(file: FileIO, size: int, place: int, values: Bits) -> bool:
    """Write at `place`, unless a file that had `size` bytes has these there already."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if place + data.size <= size:
        found = np.empty_like(data)
        file.seek(place)
        if file.readinto(found.data) == data.size and np.array_equal(found, data):
            return False
    file.seek(place)
    while data.size:  # a system writes at most 2 GiB at once
        data = data[file.write(data.data) or 0 :]
    return True


def _begin_writing(file: FileIO) -> None:
    """Have the system bring to the disk what it holds of a file, and go on: fsync, which tells of errors, has
    less to wait for."""
    with suppress(OSError, AttributeError, TypeError):  # not Linux
        ctypes.CDLL(None).sync_file_range(file.fileno(), ctypes.c_int64(), ctypes.c_int64(), _WRITE)


def drop_weights(folder: Path, *, but: set[str]) -> None:
    """Delete the weight files in OUT.partial that an interrupted run of other settings left there."""
    for path in folder.glob("*.safetensors"):
        if path.name not in but:
            path.unlink()


def file_size(tensors: list[Named], metadata: dict[str, str]) -> int:
    """Bytes of the file that `write_tensors` would write."""
    places = place(tensors)
    return 8 + len(header_text(places, metadata)) + sum(each.nbytes for each in places)


def place(tensors: list[Named], start: int = 0) -> list[Entry]:
    """Where tensors lie one after another, from byte `start` after the header on: in the order given, or if
    that is not aligned in the one of safetensors' own writer."""
    found = _in_order(tensors, start)
    if any(each.offset % DTYPES[each.dtype].storage.itemsize for each in found if each.nbytes):
        found = _in_order(sorted(tensors, key=by_alignment), start)
    return found


def by_alignment(item: Named) -> tuple[int, str]:
    """The order of safetensors' own writer."""
    return -DTYPES[item[1]].bits, item[0]


def _in_order(tensors: list[Named], start: int) -> list[Entry]:
    found: list[Entry] = []
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
        found.append(Entry(name, dtype, shape, start, nbytes))
        start += nbytes
    return found


def header_text(places: list[Entry], metadata: dict[str, str]) -> bytes:
    """The JSON of a header; offsets count from its end."""
    header = {
        each.name: {
            "dtype": each.dtype, "shape": list(each.shape),
            "data_offsets": [each.offset, each.offset + each.nbytes],
        }
        for each in places
    }  # fmt: skip
    table = ({"__metadata__": dict(sorted(metadata.items()))} if metadata else {}) | header
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def weight_file_names(source: Checkpoint, *, packed: bool) -> dict[str, str]:
    """Source weight file -> file in OUT.
    Packed files never carry a name that an ordinary loader looks for."""
    names = [path.name for path in source.files]
    if packed:
        if len(names) == 1:
            return {names[0]: "lpsparse.safetensors"}
        return {name: f"lpsparse-{i:05d}-of-{len(names):05d}.safetensors" for i, name in enumerate(names, 1)}
    if len(names) > 1:
        return {name: f"model-{i:05d}-of-{len(names):05d}.safetensors" for i, name in enumerate(names, 1)}
    if not names[0].endswith(".safetensors") or names[0] == "lpsparse.safetensors":
        return {names[0]: "model.safetensors"}
    # One shard of one needs an index to be found; without its number it is found by its name.
    return {names[0]: re.sub(r"-0+1-of-0+1(?=\.safetensors$)", "", names[0])}


def write_index(folder: Path, stem: str, weight_map: dict[str, str], total_bytes: int) -> None:
    """The index that Hugging Face loaders read for a sharded checkpoint."""
    table = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", table)


def copy_sidecars(source: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Copy what is not weights, byte for byte; returns the names of weight files left behind.

    The source's README.md becomes README.base.md. Hidden folders, links to folders, and links out of a local
    model folder stay behind.
    """
    found, left = find_sidecars(source)
    for path, name in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        fsync(folder / name)
    for path in folder.rglob("*"):  # a name is durable when its folder is
        if path.is_dir():
            fsync(path)
    return left


def find_sidecars(source: Checkpoint) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    """What `copy_sidecars` copies, with the name that it gets, and what it leaves behind."""
    if source.root is None:
        return [], ()
    found: list[tuple[Path, str]] = []
    left: list[str] = []
    root = source.root.resolve()
    used = {path.name for path in source.files}
    ours = (source.root / MANIFEST).is_file()  # then README.md is our card, and the base's is README.base.md
    for path in sorted(source.root.rglob("*")):
        relative = path.relative_to(source.root)
        folders = relative.parts if path.is_dir() else relative.parts[:-1]
        if any(part.startswith(".") for part in folders):
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
        outside = root not in path.resolve().parents
        if outside and source.revision is None:  # a hub snapshot is made of links into its cache
            left.append(f"{relative.as_posix()} (a link out of the folder)")
        elif path.suffix in FOREIGN_WEIGHTS or path.name.endswith(
            (".safetensors.index.json", ".bin.index.json")
        ):
            if relative.as_posix() not in used and not path.name.endswith(".json"):
                left.append(relative.as_posix())
        elif len(relative.parts) > 1 or path.name not in (*OURS, OWNER, REPLACED, CARD, _BASE_CARD):
            found.append((path, relative.as_posix()))
        elif path.name == (_BASE_CARD if ours or not (source.root / CARD).is_file() else CARD):
            found.append((path, _BASE_CARD))
        elif not ours:  # somebody else's, where ours is to be
            left.append(relative.as_posix())
    return found, tuple(left)


def write_json(path: Path, value: object) -> None:
    """JSON with a fixed form, durable: the same value gives the same bytes; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_report_file(path: Path, models: Iterable[str | None]) -> None:
    """Raises OutputError where a report would replace a part of a checkpoint."""
    target = path.resolve()
    inputs = [Path(model).resolve() for model in models if model is not None]
    inside = any(each == target or (each.is_dir() and each in target.parents) for each in inputs)
    if inside or (target.parent / MANIFEST).exists():
        raise OutputError(405, f"{path}: lies inside a checkpoint", mend="choose a file outside of it")
    if path.exists() and (not path.is_file() or path.suffix in FOREIGN_WEIGHTS):
        raise OutputError(401, f"{path}: exists and is no report", mend="choose another file, such as x.json")


def write_beside(path: Path, value: object) -> None:
    """`write_json` so that `path` is never half a file. Raises OutputError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # a name that nobody else's file has
    try:
        write_json(partial, value)
        partial.replace(path)
    except OSError as error:
        raise OutputError(409, f"{path}: {error.strerror}", mend="choose another file") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
