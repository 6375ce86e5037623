"""What a recipe check asks of each command: the data, patterns and memory of a step, before it runs."""

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.families import TASKS
from lpsparse.pruning.targets import Chosen
from lpsparse.steps.base import Step
from lpsparse.steps.finetune import DataStep
from lpsparse.training.data import find

NOT_YET = "matches no tensor yet; the new head may give it one"
S = TypeVar("S", bound=Step)


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint that a step would read, as far as its headers tell."""

    checkpoint: Checkpoint
    sidecar_bytes: int | None = None  # of one that is not here; else they are looked at
    download_bytes: int = 0
    renamed: bool = False  # a new head is added on the way: names may get a prefix
    chosen: Chosen | None = None  # what its manifest will say is prunable, where a step chose
    made: bool = False  # by an earlier step of the recipe


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a step before it runs."""

    chosen: Chosen | None = None  # which tensors are prunable, and why; None where the step chooses none
    notes: tuple[str, ...] = ()  # what could not be checked
    renamed: bool = False  # names in the result may differ from those in the source
    memory_bytes: int | None = None  # where training or measuring decides it
    state_bytes: int = 0  # of disk that a training state takes while it runs


def matches(pattern: str, held: Held) -> bool:
    return any(fnmatchcase(tensor.name, pattern) for tensor in held.checkpoint.tensors)


def without_unknown(step: S, held: Held, *keys: str, renamed: bool) -> tuple[S, tuple[str, ...]]:
    """`step` without the patterns of `keys` that match nothing because a new head may change names, and a
    note of each. Where no name changes, the step keeps them all."""
    unknown = [each for key in keys for each in getattr(step, key) if renamed and not matches(each, held)]
    kept = {key: tuple(each for each in getattr(step, key) if each not in unknown) for key in keys}
    return step.model_copy(update=kept), tuple(f"{each}: {NOT_YET}" for each in unknown)


def check_files(task: str, wanted: dict[str, list[str]]) -> tuple[str, ...]:
    """What could not be looked at of these splits of each data set. Rows are not read.

    Raises what the step would raise for its files.
    """
    far = [data for data in wanted if is_remote(data, "dataset")]
    for data in wanted.keys() - set(far):
        for split in wanted[data]:
            for path in find(data, split)[0]:
                _check_file(task, path)
    return tuple(f"data {each}: not in the local cache; `run` downloads it" for each in far)


def _check_file(task: str, path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise InputError(371, f"{path}: Permission denied", hint="check the data and its permissions")
    kind = TASKS[task]
    if path.is_dir() and kind.folders:
        return
    if path.is_dir() or path.suffix not in kind.suffixes:
        what = f"{path}: not data of {task} ({', '.join(kind.suffixes)})"
        raise InputError(372, what, hint="give such a file, or another task")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(381, f"{path.name}: parquet needs pyarrow", hint="pip install 'lpsparse[data]'")


def check_model(step: DataStep, source: Checkpoint) -> None:
    """Raises UsageError or InputError where nothing says how to build the module."""
    if step.model_fn is not None:
        where = step.model_fn.rpartition(":")[0]
        if where.endswith(".py") and not Path(where).is_file():
            raise UsageError(241, f"--model-fn: {where}: no such file", hint="check the path")
    elif source.files and (source.root is None or not (source.root / "config.json").is_file()):
        what = f"{source.name}: no config.json beside the weights"
        raise InputError(391, what, hint="give a Hugging Face folder, or model_fn for a bare state dict")
