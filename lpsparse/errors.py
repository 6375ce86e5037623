"""Errors a person can act on, and the exit codes a script can rely on. Standard library only."""

from enum import IntEnum
from functools import partial
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of every command. Stable: scripts branch on them."""

    OK = 0
    VERDICT = 1
    USAGE = 2
    INPUT = 3
    OUTPUT = 4
    NUMERIC = 5
    RESOURCE = 6
    STATE = 7
    REMOTE = 8
    BUG = 70
    RESUMABLE = 75
    INTERRUPT = 130


MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.VERDICT: "a budget or verification failed, or `--gap` found no band; OUT is complete",
    ExitCode.USAGE: "wrong flag, environment variable or recipe; nothing was changed",
    ExitCode.INPUT: "malformed, unsafe or unsupported checkpoint or data",
    ExitCode.OUTPUT: "OUT exists, no space, or no permission",
    ExitCode.NUMERIC: "NaN or Inf while training",
    ExitCode.RESOURCE: "out of memory or open files, or a rank died or hangs",
    ExitCode.STATE: "another run is writing OUT, or a training state belongs to another run",
    ExitCode.REMOTE: "hub unreachable, gated or offline, or a push refused",
    ExitCode.BUG: "a bug in lpsparse, with its traceback",
    ExitCode.RESUMABLE: "SIGTERM or `--max-time`; training saved its state: the same command resumes",
    ExitCode.INTERRUPT: "Ctrl-C; training saved its state: the same command resumes",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Also torch's errors, some of which have no class of their own, only words."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or told


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, but the weight files written so far stay for the next run."""


class LpsparseError(Exception):
    """A failure with a code (LPSnnn), what is wrong (with numbers) and the one thing to do (`hint`).

    `str` has both lines, so that a log or a notebook shows the hint too.
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, number: int, what: str, *, hint: str) -> None:
        super().__init__(what)
        self.code = f"LPS{number}"
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  hint: {self.hint}"

    @property
    def mend(self) -> str:
        """The name of `hint` until 0.1; it goes with the next release."""
        return self.hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, so that one process can send it to another."""
        return partial(type(self), hint=self.hint), (int(self.code[3:]), self.what)


class VerdictError(LpsparseError):
    exit_code = ExitCode.VERDICT


class UsageError(LpsparseError):
    exit_code = ExitCode.USAGE


class InputError(LpsparseError):
    exit_code = ExitCode.INPUT


class OutputError(LpsparseError):
    exit_code = ExitCode.OUTPUT


class NumericError(LpsparseError):
    exit_code = ExitCode.NUMERIC


class ResourceError(LpsparseError):
    exit_code = ExitCode.RESOURCE


class StateError(LpsparseError):
    exit_code = ExitCode.STATE


class RemoteError(LpsparseError):
    exit_code = ExitCode.REMOTE


class ResumableError(LpsparseError):
    """The run was asked to stop, and stopped after it had saved its state."""

    exit_code = ExitCode.RESUMABLE


class InterruptError(LpsparseError):
    """The same, by Ctrl-C."""

    exit_code = ExitCode.INTERRUPT


class LaunchError(LpsparseError):
    """A process of this run ended with `exit_code`. Rank 0 has printed why; the reason of another rank is in
    `said`."""

    def __init__(self, exit_code: ExitCode, *, said: str = "") -> None:
        super().__init__(600, f"a process of the run ended with exit code {int(exit_code)}", hint="see above")
        self.exit_code = exit_code
        self.said = said
