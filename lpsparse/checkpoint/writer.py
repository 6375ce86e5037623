"""Write a checkpoint so that OUT is either absent or whole:
sibling folder, fsync, re-open, manifest last, rename.

A half-written safetensors file is valid and looks wonderfully sparse, so nothing is trusted until it was
read back.
"""

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.opening import WEIGHT_SUFFIXES, Checkpoint
from lpsparse.errors import OutputError, StateError

MANIFEST = "lpsparse.json"
REPORT = "report.json"
CARD = "README.md"
METRICS = "metrics.jsonl"
STATE = ".lpsparse-state"  # folder in OUT.partial of an unfinished run's training states
OURS = (MANIFEST, REPORT, METRICS)  # of an earlier run on the source: never carried over
OWNER = ".lpsparse-owner.json"
_NEW = f"{OWNER}.new"
_NOBODY = -1  # a process id that no process has
REPLACED = (
    ".lpsparse-replaced"  # in an OUT that is being exchanged: only such an OUT.old is put back or deleted
)
# Weights in formats that we do not rewrite: a loader would prefer them to ours, so they stay behind.
_FOREIGN_WEIGHTS = (
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


def check_output(
    out: Path, source: Checkpoint, need_bytes: int, *, overwrite: bool, reads: Iterable[Path] = ()
) -> None:
    """Refuse early what would fail late; `reads` are inputs beside `source`.

    Raises OutputError; nothing is touched but an interrupted exchange, which is undone.
    """
    if out.name in ("", ".."):
        raise OutputError(401, f"{out}: exists already", mend="choose another OUT")
    try:
        os.lstat(partial_of(out))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name too long, a folder closed to us
        raise OutputError(404, f"{out}: {error.strerror}", mend="choose another OUT") from error
    old = out.with_name(out.name + ".old")
    if (old / REPLACED).is_file() and not os.path.lexists(out):
        old.rename(out)  # a run that died between the two renames of --overwrite
        (out / REPLACED).unlink()
    if overwrite and os.path.lexists(old) and not (old / REPLACED).is_file():
        raise OutputError(402, f"{old}: is in the way of --overwrite", mend="move it away")
    if out.is_symlink() or (out.exists() and not overwrite):
        raise OutputError(
            401,
            f"{out}: exists already",
            mend="choose another OUT, or --overwrite (overwrite: true in a recipe)",
        )
    if out.exists() and not (out / MANIFEST).is_file():
        raise OutputError(
            402, f"{out}: --overwrite replaces only what lpsparse wrote", mend="choose another OUT"
        )
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(403, f"{parent}: no such folder", mend=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(404, f"{parent}: no permission to write here", mend="choose another OUT")
    inputs = {path.resolve() for path in (*source.files, *reads)}
    folder = source.root.resolve() if source.root else None
    target = out.resolve()
    if folder is not None and (target == folder or folder in target.parents):
        raise OutputError(405, f"{out}: lies inside the input", mend="choose an OUT outside MODEL")
    if any(target == path or target in path.parents for path in inputs):
        raise OutputError(405, f"{out}: holds the input", mend="choose another OUT")
    free = shutil.disk_usage(parent).free
    if need_bytes * 1.05 > free:
        what = f"{out}: needs {need_bytes} bytes, {free} are free"
        raise OutputError(406, what, mend="free some space or choose another disk")


@contextmanager
def output_folder(
    out: Path, *, overwrite: bool = False, states: Literal["refuse", "resume", "drop"] = "refuse"
) -> Generator[Path]:
    """A sibling `OUT.partial` to write into; renamed to OUT on success, removed on any failure, unless it
    holds training states: these stay. An earlier run's are found there again, or dropped, or refused.

    Raises StateError when a living process holds it, or states that are not looked for.
    """
    partial = partial_of(out)
    _take(partial, states)
    try:
        yield partial
        fsync(partial)
        _exchange(partial, out, overwrite=overwrite)
        shutil.rmtree(out / STATE, ignore_errors=True)
        (out / OWNER).unlink()  # not before: killed in between, nobody could tell that OUT.partial was ours
        fsync(out)
        fsync(out.absolute().parent)
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise OutputError(
            407, what, mend="mend the disk or choose another OUT; the input is untouched"
        ) from error
    finally:
        if partial.exists():
            if has_states(partial):
                with suppress(OSError):  # a full disk: then the process is found to be gone
                    _own(partial, _NOBODY)
            else:
                remove_ours(partial, OWNER)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def has_states(partial: Path) -> bool:
    """Whether a run left training states there."""
    return any(path.name[5:].isdecimal() for path in (partial / STATE).glob("step-*"))


def _take(partial: Path, states: str) -> None:
    if os.path.lexists(partial):
        host, pid, since = _holder(partial)
        if pid != _NOBODY and (host != socket.gethostname() or _is_running(pid, since)):
            what = f"{partial}: process {pid} on {host} is writing it"
            mend = f"wait for it; if it is dead, delete {OWNER} in there (or all of it)"
            raise StateError(702, what, mend=mend)
        if states == "refuse" and has_states(partial):
            what = f"{partial}: holds the training states of an unfinished run"
            raise StateError(709, what, mend="choose another OUT, or delete it if you do not want them")
        if states == "resume" and has_states(partial):
            _take_over(partial)
            return
        remove_ours(partial, OWNER)  # left by a killed run; nothing in it was ever finished
    try:
        partial.mkdir()
        _own(partial, os.getpid())
    except OSError as error:
        raise OutputError(404, f"{partial}: {error.strerror}", mend="choose another OUT") from error


def _is_running(pid: int, since: float) -> bool:
    """Whether it is that process, and not a later one of its number (a container's is often the same)."""
    try:
        started = psutil.Process(pid).create_time()
        return since == 0 or abs(started - since) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _take_over(partial: Path) -> None:
    """Of an unfinished run all but its states and metrics goes. Of two that try only one can."""
    try:
        (partial / OWNER).touch()
        (partial / OWNER).rename(partial / f"{OWNER}.{os.getpid()}")
    except FileNotFoundError:
        what = f"{partial}: another process is taking it"
        raise StateError(702, what, mend="wait for it, or delete it if that run is dead") from None
    _own(partial, os.getpid())
    for path in partial.iterdir():
        if path.name not in (OWNER, STATE, METRICS):
            _remove(path)


def _own(partial: Path, pid: int) -> None:
    fresh = partial / _NEW
    since = 0.0 if pid == _NOBODY else psutil.Process(pid).create_time()
    fresh.write_text(json.dumps({"pid": pid, "host": socket.gethostname(), "since": since}))
    fresh.replace(partial / OWNER)


def _holder(partial: Path) -> tuple[str, int, float]:
    """Host and process that hold a `.partial`, and when it began; nobody when it died before it could say so,
    and when a person has deleted the mark."""
    try:
        holder = json.loads((partial / OWNER).read_text())
        return str(holder["host"]), int(holder["pid"]), float(holder.get("since", 0))
    except (OSError, ValueError, KeyError, TypeError):
        ours = partial.is_dir() and not partial.is_symlink()
        if ours and (set(os.listdir(partial)) <= {OWNER, _NEW} or has_states(partial)):
            return socket.gethostname(), _NOBODY, 0.0
        raise StateError(701, f"{partial}: exists and is not ours", mend="move it away") from None


def _exchange(partial: Path, out: Path, *, overwrite: bool) -> None:
    old = out.with_name(out.name + ".old")
    if overwrite and out.exists():
        if (old / REPLACED).is_file():
            remove_ours(old, REPLACED)
        (out / REPLACED).touch()
        out.rename(old)  # an OSError where a folder that is not ours has come to stand there
        partial.rename(out)
        remove_ours(old, REPLACED)
    else:
        partial.rename(out)


def remove_ours(folder: Path, mark: str) -> None:
    """Delete a folder of ours, the mark that it is ours last: killed in between, it can still be told."""
    for path in folder.iterdir():
        if path.name != mark:
            _remove(path)
    shutil.rmtree(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: list[Named], metadata: dict[str, str], parts: Iterable[Part]) -> None:
    """Write one safetensors file from a stream of parts, each placed by name and first storage unit.

    Memory is one part. Every byte must be given exactly once: less is our own bug and asserts.
    """
    text, offsets, position = _header(tensors, metadata)
    written = 0
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, first, values in parts:
            start, itemsize = offsets[name]
            file.seek(8 + len(text) + start + first * itemsize)
            file.write(values.tobytes())
            written += values.nbytes
        file.flush()
        os.fsync(file.fileno())
    assert written == position, f"{path.name}: {written} of {position} bytes were given"


def file_size(tensors: list[Named], metadata: dict[str, str]) -> int:
    """Bytes of the file that `write_tensors` would write."""
    text, _, position = _header(tensors, metadata)
    return 8 + len(text) + position


def _header(tensors: list[Named], metadata: dict[str, str]) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """The header, (offset, bytes of a storage unit) of each tensor after it, and the bytes of them all."""
    ordered = sorted(
        tensors, key=lambda item: (-DTYPES[item[1]].bits, item[0])
    )  # aligned, as the reference writer
    offsets, header, position = {}, {}, 0
    for name, dtype, shape in ordered:
        nbytes = math.prod(shape) * DTYPES[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        offsets[name] = (position, DTYPES[dtype].storage.itemsize)
        position += nbytes
    table = ({"__metadata__": dict(sorted(metadata.items()))} if metadata else {}) | header
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return text, offsets, position


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

    The source's README.md becomes README.base.md. Hidden folders and links out of a local model folder stay
    behind.
    """
    if source.root is None:
        return ()
    left: list[str] = []
    root = source.root.resolve()
    used = {path.name for path in source.files}
    ours = (source.root / MANIFEST).is_file()  # then README.md is our card, and the base's is README.base.md
    for path in sorted(source.root.rglob("*")):
        relative = path.relative_to(source.root)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts[:-1]):
            continue
        outside = root not in path.resolve().parents
        if outside and source.revision is None:  # a hub snapshot is made of links into its cache
            left.append(f"{relative.as_posix()} (a link out of the folder)")
        elif path.suffix in _FOREIGN_WEIGHTS or path.name.endswith(
            (".safetensors.index.json", ".bin.index.json")
        ):
            if relative.as_posix() not in used and not path.name.endswith(".json"):
                left.append(relative.as_posix())
        elif len(relative.parts) > 1 or path.name not in (*OURS, OWNER, REPLACED, *((CARD,) if ours else ())):
            name = "README.base.md" if relative.as_posix() == CARD else relative.as_posix()
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            fsync(folder / name)
    return tuple(left)


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
    if path.exists() and (not path.is_file() or path.suffix in _FOREIGN_WEIGHTS):
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
