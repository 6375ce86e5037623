"""The data of a step, before the step runs: there, readable, of the task's kind, and the parts apart."""

import os
from importlib.util import find_spec
from pathlib import Path

from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.training.data import check_apart, find, held_out_of

_TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
_KINDS = {
    "causal-lm": (".txt", *_TABLES),
    "masked-lm": (".txt", *_TABLES),
    "text-classification": _TABLES,
    "image-classification": (".npz", ".parquet"),
}


def check_data(step: FinetuneStep | EvalStep, source: Checkpoint) -> list[str]:
    """What could not be looked at. Raises what the step would raise for its files. Rows are not read."""
    _check_model(step, source)
    wanted = {step.data: [step.split]}
    held = None
    if isinstance(step, FinetuneStep):
        known = step.eval_data or step.eval_split or not is_remote(step.data, "dataset")
        held = held_out_of(step) if known else None
    if held is not None:
        wanted.setdefault(held[0], []).append(held[1])
    far = [data for data in wanted if is_remote(data, "dataset")]
    for data in wanted.keys() - set(far):
        for split in wanted[data]:
            for path in find(data, split)[0]:
                _check_file(step.task, path)
    if not far and held is not None:
        check_apart(step.data, step.split, *held)
    return [f"data {each}: not in the local cache; `run` downloads it" for each in far]


def _check_file(task: str, path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise InputError(371, f"{path}: Permission denied", hint="check the data and its permissions")
    if path.is_dir() and task == "image-classification":
        return
    if path.is_dir() or path.suffix not in _KINDS[task]:
        what = f"{path}: not data of {task} ({', '.join(_KINDS[task])})"
        raise InputError(372, what, hint="give such a file, or another task")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(381, f"{path.name}: parquet needs pyarrow", hint="pip install 'lpsparse[data]'")


def _check_model(step: FinetuneStep | EvalStep, source: Checkpoint) -> None:
    """Whether there is something to build the module with."""
    if step.model_fn is not None:
        where = step.model_fn.rpartition(":")[0]
        if where.endswith(".py") and not Path(where).is_file():
            raise UsageError(241, f"--model-fn: {where}: no such file", hint="check the path")
    elif source.files and (source.root is None or not (source.root / "config.json").is_file()):
        what = f"{source.name}: no config.json beside the weights"
        raise InputError(391, what, hint="give a Hugging Face folder, or model_fn for a bare state dict")
