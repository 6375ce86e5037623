"""Errors a person can act on, and the exit codes a script can rely on. Standard library only."""

from enum import IntEnum
from functools import partial
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of every command. Stable: scripts branch on them."""

    OK = 0
    VERDICT = 1  # ran to the end, the artefact is whole, but a budget or a verification failed
    USAGE = 2  # flag, environment variable or recipe wrong; nothing touched
    INPUT = 3  # checkpoint, data or report malformed, unsafe or unsupported
    OUTPUT = 4  # exists, no space, no permission
    NUMERIC = 5  # NaN, Inf or divergence
    RESOURCE = 6  # out of memory, no device
    STATE = 7  # another run holds OUT, or resume refused
    REMOTE = 8  # hub unreachable, gated or offline, or it refuses a push
    BUG = 70
    RESUMABLE = 75
    INTERRUPT = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Also torch's, which has a class for the one that its allocator tells, and for others only words."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or told


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: it ends as at Ctrl-C, but what it has written so far may stay for another run."""


class LpsparseError(Exception):
    """A failure with a code (LPSnnn), what is wrong (with numbers) and the one thing to do (`mend`)."""

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, number: int, what: str, *, mend: str) -> None:
        super().__init__(what)
        self.code = f"LPS{number}"
        self.what = what
        self.mend = mend
        self.add_note(f"  mend: {mend}")  # a traceback has the second line, too

    def __reduce__(self) -> tuple[Any, ...]:
        """So that one process can tell another."""
        return partial(type(self), mend=self.mend), (int(self.code[3:]), self.what)


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
    """The run was asked to stop, and did, after it had saved its state."""

    exit_code = ExitCode.RESUMABLE


class InterruptError(LpsparseError):
    """The same, by Ctrl-C."""

    exit_code = ExitCode.INTERRUPT


class LaunchError(LpsparseError):
    """A process that was started for this run ended with `exit_code`. Process 0 has said why; of another,
    which is silent, it is in `said`."""

    def __init__(self, exit_code: ExitCode, *, said: str = "") -> None:
        super().__init__(600, f"a process of the run ended with exit code {int(exit_code)}", mend="see above")
        self.exit_code = exit_code
        self.said = said
