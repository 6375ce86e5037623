"""Open a command's input checkpoint, and set its number of threads."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from lpsparse.checkpoint.open import Checkpoint, open_checkpoint
from lpsparse.commands.artefact import Say
from lpsparse.errors import InputError
from lpsparse.parallel.threads import on_every_rank, using_threads
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.report import ReportStep, VerifyStep

S = TypeVar("S", PruneStep, PackStep, PackStep | UnpackStep, ReportStep, VerifyStep)
R = TypeVar("R")


def silent(_: Any) -> None:
    """Says nothing. Given as `say`, processes that a step starts are silent too."""


def on_threads(verb: Callable[[S, Say], R]) -> Callable[..., R]:
    """Run a command on the step's own number of threads. Raises InputError for a disk that cannot be read."""

    @wraps(verb)
    def run(step: S, say: Say = silent) -> R:
        try:
            with using_threads(step.threads):
                return verb(step, say)
        except OSError as error:  # what cannot be written is an OutputError by now
            what = f"{error.filename or step.model}: {error.strerror or error}"
            raise InputError(338, what, hint="check the disk that it is on, and run again") from error

    return run


def opened(
    model: str,
    say: Say,
    weights: str | None = None,
    key: str | None = None,
    *,
    needed: bool = True,
    strict: bool = True,
) -> Checkpoint:
    """`open_checkpoint`, its notes said. Raises InputError when it has no tensors, where some are needed."""
    checkpoint = on_every_rank(lambda: open_checkpoint(model, weights, key, strict=strict))
    for note in checkpoint.notes:
        say(f"{checkpoint.name}: {note}")
    if not checkpoint.tensors and needed:
        raise InputError(335, f"{checkpoint.name}: holds no tensors", hint="give a checkpoint with weights")
    if not checkpoint.tensors:
        say(f"{checkpoint.name}: holds no tensors")
    return checkpoint
