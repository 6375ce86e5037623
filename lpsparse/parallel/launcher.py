"""Start the ranks of a job on this machine, and end them together."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from lpsparse.borrowed import borrow
from lpsparse.errors import ExitCode, LaunchError, ResourceError
from lpsparse.parallel.ranks import MISSED

_PATIENCE = 24 * 3600  # seconds that processes which were asked to stop have to end their step and save

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

_TOGETHER = 2.0  # seconds: failures so near to the first one may be its cause


def launch(processes: int, arguments: list[str]) -> None:
    """Run `python -m lpsparse ARGUMENTS` in that many processes on this machine, and wait for them.

    Raises LaunchError with the exit code of the process that failed first, and ResourceError for one that
    was killed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    launcher = borrow("torch.distributed.launcher.api:elastic_launch")
    if launcher is None:
        _torchrun(processes, arguments)
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

    logs = Path(tempfile.mkdtemp(prefix="lpsparse-ranks-"))
    # torch 2.10 gives processes that were asked to stop 30 seconds, and cannot be told otherwise.
    known = {each.name for each in fields(LaunchConfig)}
    patience: dict[str, Any] = {"shutdown_timeout": _PATIENCE} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(os.getpid()),
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.OUT),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        **patience,
    )
    _quiet_elastic()
    try:
        with _same_handlers_after():
            launcher(config, sys.executable)("-u", "-m", "lpsparse", *arguments)
    except ChildFailedError as error:
        raise _first_failure(error.failures) from None
    except SignalException as error:
        stop = error.sigval == signal.SIGINT
        raise LaunchError(ExitCode.INTERRUPT if stop else ExitCode.RESUMABLE) from None
    finally:
        shutil.rmtree(logs, ignore_errors=True)


@contextmanager
def _same_handlers_after() -> Generator[None]:
    """torch's launcher leaves its handlers of signals behind, which raise SignalException wherever they find
    the program, at its very end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {to_float: signal.getsignal(to_float) for to_float in signal.valid_signals()}
    try:
        yield
    finally:
        for to_float, handler in before.items():
            if handler is not None and signal.getsignal(to_float) != handler:
                signal.signal(to_float, handler)


def _torchrun(processes: int, arguments: list[str]) -> None:
    """`launch` by torch's own command, which does not pass on the exit code of what failed."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "lpsparse"]
    if subprocess.run([sys.executable, *words, *arguments], stdout=subprocess.DEVNULL).returncode:
        raise LaunchError(ExitCode.RESOURCE)


def end_with_launcher() -> None:
    """Ask this process to stop when its launcher is killed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Linux sends it once for every thread of the dying parent: one that may be repeated.
        end_with_parent(signal.SIGUSR1)


def end_with_parent(number: int) -> None:
    """Send this process signal `number` when its parent is gone. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(number))


def _quiet_elastic() -> None:
    import logging

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _first_failure(failures: dict[int, Any]) -> LaunchError | ResourceError:
    """The failure that ended the run: a killed process before one that then missed it."""
    earliest = min(failure.timestamp for failure in failures.values())
    near = sorted(
        (each for each in failures.values() if each.timestamp <= earliest + _TOGETHER),
        key=lambda each: (each.exitcode >= 0 or each.exitcode == -signal.SIGTERM, each.local_rank),
    )
    first = near[0]
    if first.exitcode < 0 and first.exitcode != -signal.SIGTERM:
        name = signal.Signals(-first.exitcode).name
        what = f"process {first.local_rank} was ended by {name}; the others were stopped"
        hint = "run the same command again: it resumes from the last training state, if there is one"
        return ResourceError(603, what, hint=hint)
    failed = [each for each in near if each.exitcode > 0]
    # What misses another process says so, and what the launcher then stops ends as if it were asked to.
    after = (ExitCode.RESUMABLE, ExitCode.INTERRUPT)
    causes = (each for each in failed if each.exitcode not in after and _said(each, "code") != f"LPS{MISSED}")
    cause = next(causes, first)
    code = ExitCode(cause.exitcode) if cause.exitcode in list(ExitCode) else ExitCode.RESOURCE
    said = _said(cause, "message")
    if not said:
        said = f"process {cause.local_rank} ended with exit code {cause.exitcode}"
    elif cause.local_rank == 0:
        said = ""  # it spoke for itself
    return LaunchError(code, said=said)


def _said(failure: Any, key: str) -> str:
    """What a failed rank recorded about its error; empty if nothing."""
    said = str(failure.error_file_data.get(key, ""))
    return "" if said == "<NONE>" else said  # elastic's own word
