"""OUT is either absent or complete: write into OUT.partial, which one process holds, and rename it last.

A half-written safetensors file is valid and looks wonderfully sparse, so nothing has its name before it was
read back. The owner is a process id in a file, not a lock such as filelock's: a lock says neither who holds
it nor on which host, the children of a killed process keep it, and network disks may have none.
"""

import ctypes
import json
import os
import shutil
import socket
import stat
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

from lpsparse.checkpoint.files import METRICS, OWNER, REPLACED, STATE, fsync
from lpsparse.errors import OutputError, StateError, TerminatedError
from lpsparse.parallel.threads import on_rank_0

_NEW = f"{OWNER}.new"
_NOBODY = -1  # a process id that no process has
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextmanager
def output_folder(
    out: Path,
    *,
    overwrite: bool = False,
    states: Literal["refuse", "resume", "drop"] = "refuse",
    weights: Literal["keep", "drop"] = "drop",
) -> Generator[Path]:
    """A sibling `OUT.partial` to write into; renamed to OUT on success, removed on any failure, unless it
    holds training states: these stay. An earlier run's are found there again, or dropped, or refused.

    With `weights` to keep, the weight files of a run that was killed are found there again, whatever they
    hold, and those of this run stay when SIGTERM or the loss of another process ends it. Raises StateError
    when a living process holds OUT.partial, or states that are not looked for.
    """
    partial = partial_of(out)
    _take(partial, states, weights)
    stays = False
    try:
        _check_renames(partial)
        yield partial
        fsync(partial)
        _exchange(partial, out, overwrite=overwrite)
        shutil.rmtree(out / STATE, ignore_errors=True)
        (out / OWNER).unlink()  # not before: killed in between, nobody could tell that OUT.partial was ours
        fsync(out)
    except OSError as error:
        raise failed(out, error) from error
    except (TerminatedError, RuntimeError):  # torch's own, where another process is lost
        stays = weights == "keep"
        raise
    finally:
        if partial.exists():
            with suppress(OSError):  # what went wrong before is to be told; the next run finds this one gone
                if stays or has_states(partial):
                    _own(partial, _NOBODY)
                else:
                    remove_ours(partial, REPLACED if (partial / REPLACED).is_file() else OWNER)


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def has_states(partial: Path) -> bool:
    """Whether a run left training states there."""
    return any(path.name[5:].isdecimal() for path in (partial / STATE).glob("step-*"))


@contextmanager
def shared_folder(out: Path, *, overwrite: bool) -> Generator[Path]:
    """`output_folder` for all processes of a job, `among` which one makes and renames it; their weights stay
    where it says."""
    with ExitStack() as stack:
        on_rank_0(lambda: stack.enter_context(output_folder(out, overwrite=overwrite, weights="keep")))
        try:
            yield partial_of(out)
        except OSError as error:
            raise failed(out, error) from error
        on_rank_0(stack.close)


def failed(out: Path, error: OSError) -> OutputError:
    name = str(error.filename or "")  # shutil's are names in a folder
    what = f"{name if os.path.dirname(name) else out}: {error.strerror or error}"
    return OutputError(407, what, hint="fix the disk or choose another OUT; the input is untouched")


def left_bytes(out: Path) -> int:
    """Bytes of the weight files that a killed run left for the next one to use."""
    partial = partial_of(out)
    return sum(path.stat().st_size for path in partial.glob("*") if _is_weights(path))


def _is_weights(path: Path) -> bool:
    """A file of its own: written into, it must not be anybody else's by a link."""
    info = path.lstat()
    return path.suffix == ".safetensors" and stat.S_ISREG(info.st_mode) and info.st_nlink == 1


def _take(partial: Path, states: str, weights: str) -> None:
    try:
        with suppress(FileExistsError):
            partial.mkdir()
        _check_ours(partial)
        with _locked(partial):
            _check_free(partial, states)
            _own(partial, os.getpid())
            kept = {OWNER, STATE, METRICS} if states == "resume" and has_states(partial) else {OWNER}
            for path in partial.iterdir():  # left by a run that was killed, its mark last
                if path.name not in kept and not (weights == "keep" and _is_weights(path)):
                    _remove(path)
    except OSError as error:
        raise OutputError(404, f"{partial}: {error.strerror}", hint="choose another OUT") from error


def check_partial(out: Path) -> None:
    """Raises StateError, before anything is read, where OUT.partial is somebody else's."""
    partial = partial_of(out)
    if os.path.lexists(partial):
        _check_ours(partial)
        _check_held(partial)


def _check_ours(partial: Path) -> None:
    if not _is_ours(partial):
        raise StateError(701, f"{partial}: exists, and lpsparse did not write it", hint="move it away")


def _check_free(partial: Path, states: str) -> None:
    _check_held(partial)
    if states == "refuse" and has_states(partial):
        what = f"{partial}: holds the training states of an unfinished run"
        raise StateError(709, what, hint="choose another OUT, or delete it if you do not want them")


def _check_held(partial: Path) -> None:
    host, pid, since = _holder(partial)
    if pid != _NOBODY and (host != socket.gethostname() or _is_running(pid, since)):
        what = f"{partial}: process {pid} on {host} is writing it"
        hint = f"wait for it; if it is dead, delete {OWNER} in there (or all of it)"
        raise StateError(702, what, hint=hint)


def _check_renames(partial: Path) -> None:
    """Refuse early a disk (an object store's mount) that cannot rename folders, as the last step needs."""
    probe, renamed = partial / f"{OWNER}.a", partial / f"{OWNER}.b"
    try:
        probe.mkdir()
        probe.rename(renamed)
        renamed.rmdir()
    except OSError as error:
        what = f"{partial.parent}: cannot rename folders ({error.strerror})"
        raise OutputError(
            410, what, hint="choose an OUT on another disk, and copy it when it is complete"
        ) from error


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """One process at a time is in here, where the system and the disk have locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise StateError(702, f"{folder}: another process has just ended", hint="run it again")
        yield
    finally:
        os.close(descriptor)


def _is_running(pid: int, since: float) -> bool:
    """Whether it is that process, and not a later one of its number (a container's is often the same)."""
    try:
        started = psutil.Process(pid).create_time()
        return since == 0 or abs(started - since) < 2
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _own(partial: Path, pid: int) -> None:
    since = 0.0 if pid == _NOBODY else psutil.Process(pid).create_time()
    fresh = partial / _NEW
    fresh.write_text(json.dumps({"pid": pid, "host": socket.gethostname(), "since": since}))
    fresh.replace(partial / OWNER)


def _is_ours(partial: Path) -> bool:
    """Whether it is a folder with our mark; a run may die before it, and a person may delete it."""
    if not partial.is_dir() or partial.is_symlink():
        return False
    marked = (partial / OWNER).is_file() or (partial / REPLACED).is_file()
    return marked or set(os.listdir(partial)) <= {_NEW} or has_states(partial)


def _holder(partial: Path) -> tuple[str, int, float]:
    """Host and process that hold a `.partial`, and when it began; nobody where no mark can be read."""
    try:
        holder = json.loads((partial / OWNER).read_text())
        return str(holder["host"]), int(holder["pid"]), float(holder.get("since", 0))
    except (OSError, ValueError, KeyError, TypeError):
        return socket.gethostname(), _NOBODY, 0.0


def _exchange(partial: Path, out: Path, *, overwrite: bool) -> None:
    old = out.with_name(out.name + ".old")
    if not overwrite or not out.exists():
        partial.rename(out)
        fsync(out.absolute().parent)
        return
    if (old / REPLACED).is_file():
        remove_ours(old, REPLACED)
    (out / REPLACED).touch()
    fsync(out)
    if exchange_names(partial, out):
        old = partial
    else:
        out.rename(old)  # an OSError where a folder that is not ours has come to stand there
        partial.rename(out)
    fsync(
        out.absolute().parent
    )  # before the old one goes: of a rename that is not synced a disk knows nothing
    remove_ours(old, REPLACED)


def exchange_names(a: Path, b: Path) -> bool:
    """Give each of two paths the other's name in one call; False where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library without it
        return False
    return rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0


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
