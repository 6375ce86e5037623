"""What writing an OUT needs of a disk, tried out in a hidden folder."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lpsparse.checkpoint.output import exchange_names
from lpsparse.checkpoint.writer import fsync


def try_disk(folder: Path) -> Iterator[tuple[str, float, str]]:
    """Name of each trial, seconds that it took, and why it failed ("" where it did not). Nothing is left.

    Raises OSError where `folder` cannot be written at all.
    """
    probe = Path(tempfile.mkdtemp(prefix=".lpsparse-doctor-", dir=folder))
    try:
        for name, trial in _TRIALS.items():
            started, why = time.perf_counter(), ""
            try:
                trial(probe)
            except OSError as error:
                why = error.strerror or str(error)
            except ImportError:
                why = "this system has none"
            yield name, time.perf_counter() - started, why
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _rename(probe: Path) -> None:
    (probe / "a").mkdir()
    (probe / "a").rename(probe / "b")


def _exchange(probe: Path) -> None:
    for name in ("c", "d"):
        (probe / name).mkdir()
    if not exchange_names(probe / "c", probe / "d"):
        raise OSError("two names cannot be exchanged in one call")


def _fsync(probe: Path) -> None:
    (probe / "file").write_bytes(bytes(1 << 20))
    fsync(probe / "file")
    fsync(probe)


def _lock(probe: Path) -> None:
    import fcntl

    descriptor = os.open(probe, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


_TRIALS: dict[str, Callable[[Path], None]] = {
    "rename": _rename, "exchange": _exchange, "fsync": _fsync, "lock": _lock,
}  # fmt: skip
