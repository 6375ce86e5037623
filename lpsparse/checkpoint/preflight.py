"""Refuse before the first byte what would fail after the last: an OUT that cannot be, or should not."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lpsparse.checkpoint.files import MANIFEST, REPLACED, find_sidecars
from lpsparse.checkpoint.hub import is_cached
from lpsparse.checkpoint.manifest import list_files, read_manifest
from lpsparse.checkpoint.tensors import Checkpoint
from lpsparse.checkpoint.transaction import check_partial, left_bytes, partial_of
from lpsparse.errors import InputError, OutputError


def check_output(
    out: Path, source: Checkpoint, need_bytes: int, *, overwrite: bool, reads: Iterable[Path] = ()
) -> None:
    """Refuse early what would fail late; `reads` are inputs beside `source`.

    Raises OutputError, and InputError for a file that could not be copied; nothing is touched but an
    interrupted exchange, which is undone.
    """
    _check_name(out, overwrite=overwrite)
    check_place(out, source, reads, out.absolute().parent)
    check_partial(out)
    for path, _ in find_sidecars(source)[0]:
        if not os.access(path, os.R_OK):
            what = f"{path}: permission denied, so it cannot be copied to OUT"
            raise InputError(305, what, hint="check its permissions, or move it away")
    free = shutil.disk_usage(out.absolute().parent).free + left_bytes(out)
    if need_bytes * 1.05 > free:
        what = f"{out}: needs {need_bytes} bytes, {free} are free"
        raise OutputError(406, what, hint="free some space or choose another disk")


def check_keeps(source: Checkpoint) -> Path:
    """The folder of a checkpoint, in which a figure of it can be recorded. Raises OutputError where lpsparse
    did not write it, and where nothing can be written."""
    folder = source.root
    if folder is None or not (folder / MANIFEST).is_file():
        what = f"{source.name}: lpsparse did not write it, and an input is never written to"
        hint = "save in the sparse folder: `lpsparse eval SPARSE --data DATA --against MODEL --save`"
        raise OutputError(415, what, hint=hint)
    if source.revision is not None or is_cached(folder.resolve()):
        what = f"{source.name}: lies inside the hub's cache, which is never written to"
        raise OutputError(415, what, hint="download it to a folder of your own, and give that")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(404, f"{folder}: no permission to write here", hint="save in a copy of it")
    return folder


def _check_name(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError if OUT exists and may not be replaced, or its name cannot be used."""
    if out.name in ("", ".."):
        raise OutputError(401, f"{out}: exists already", hint="choose another OUT")
    try:
        os.lstat(partial_of(out))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name too long, a folder closed to us
        raise OutputError(404, f"{out}: {error.strerror}", hint="choose another OUT") from error
    old = out.with_name(out.name + ".old")
    if (old / REPLACED).is_file() and not os.path.lexists(out):
        old.rename(out)  # a run that died between the two renames of --overwrite
        (out / REPLACED).unlink()
    if overwrite and os.path.lexists(old) and not (old / REPLACED).is_file() and not _is_empty(old):
        raise OutputError(402, f"{old}: is in the way of --overwrite", hint="move it away")
    ours = (out / MANIFEST).is_file()
    if out.is_symlink() or (out.exists() and not overwrite):
        also = ", or --overwrite (overwrite: true in a recipe)" if ours and not out.is_symlink() else ""
        raise OutputError(401, f"{out}: exists already", hint=f"choose another OUT{also}")
    if out.exists():
        _check_ours(out)


def _check_ours(out: Path) -> None:
    """Raises OutputError where --overwrite would delete what lpsparse did not write."""
    what, hint = f"{out}: --overwrite replaces only what lpsparse wrote", "choose another OUT"
    try:
        manifest = read_manifest(out)
    except InputError as error:
        raise OutputError(402, f"{what}: {error.what}", hint=hint) from None
    listed = {record.name for record in manifest.files}
    present = {path.relative_to(out).as_posix() for path in list_files(out)}
    others = sorted(name for name in present - listed if not name.startswith(".cache/"))  # of a download
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        raise OutputError(402, f"{what}: {others[0]}{more} would be lost", hint=f"move it away, or {hint}")


def check_place(out: Path, source: Checkpoint, reads: Iterable[Path], parent: Path) -> None:
    """Whether the folder that it is to be in can be written to, and is not somebody else's. `parent` is that
    folder, or the one in which that will be made."""
    if not parent.is_dir():
        raise OutputError(403, f"{parent}: no such folder", hint=f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(404, f"{parent}: no permission to write here", hint="choose another OUT")
    inputs = {path.resolve() for path in (*source.files, *reads)}
    folder = source.root.resolve() if source.root else None
    target = out.resolve()
    if folder is not None and (target == folder or folder in target.parents):
        raise OutputError(405, f"{out}: lies inside the input", hint="choose an OUT outside MODEL")
    if any(target == path or target in path.parents for path in inputs):
        raise OutputError(405, f"{out}: holds the input", hint="choose another OUT")
    within = next((each for each in target.parents if (each / MANIFEST).is_file()), None)
    if within is not None:
        what = f"{out}: lies inside {within.name}, which lpsparse wrote and which would no longer verify"
        raise OutputError(405, what, hint="choose an OUT outside of it")
    if is_cached(target):
        raise OutputError(405, f"{out}: lies inside the hub's cache", hint="choose an OUT outside of it")


def _is_empty(folder: Path) -> bool:
    """As a run leaves a folder that it deletes, when it dies after the last file."""
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
