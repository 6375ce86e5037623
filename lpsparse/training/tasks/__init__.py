"""What a model is trained and measured on: one file per task, and here what others ask about each.

A record imports its task's module, and torch with it, when it prepares. To add a task: a module with its
`prepare` and a record, and a line in `lpsparse/families.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from lpsparse.steps.finetune import EvalStep, FinetuneStep

if TYPE_CHECKING:
    from lpsparse.checkpoint.open import Checkpoint
    from lpsparse.training.tasks.base import Task

Prepare = Callable[[FinetuneStep | EvalStep, "Checkpoint"], "Task"]
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class TaskKind:
    """`prepare` loads and checks model and data."""

    prepare: Prepare
    hub: str  # the hub's name of the task (https://huggingface.co/tasks)
    suffixes: tuple[str, ...]  # of its data files
    folders: bool = False  # a folder with one folder per class is data, too
    augment: str = "none"  # the value of --augment that it can do
    fresh_head: bool = False  # a base model without the task's head gets one


def _of_module(name: str) -> Prepare:
    def prepare(step: FinetuneStep | EvalStep, checkpoint: "Checkpoint") -> "Task":
        return import_module(f"{__name__}.{name}").prepare(step, checkpoint)

    return prepare


CAUSAL_LM = TaskKind(_of_module("causal_lm"), "text-generation", (".txt", *TABLES))
MASKED_LM = TaskKind(_of_module("masked_lm"), "fill-mask", (".txt", *TABLES))
TEXT_CLASSIFICATION = TaskKind(
    _of_module("text_classification"), "text-classification", TABLES, augment="noise", fresh_head=True
)
IMAGE_CLASSIFICATION = TaskKind(
    _of_module("image_classification"),
    "image-classification",
    (".npz", ".parquet"),
    folders=True,
    augment="crop-flip",
    fresh_head=True,
)
