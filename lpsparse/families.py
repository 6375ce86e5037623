"""Every family and its members. To add one: a module that holds its record, and one line here.

A member's module is imported when the member is first asked for, so that names cost nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Family(Mapping[str, Any]):
    """Members by name: each `MODULE:NAME` in the folder `room` of lpsparse, or the record itself."""

    room: str
    members: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        member = self.members[name]
        if not isinstance(member, str):
            return member
        module, _, record = member.partition(":")
        return getattr(import_module(f"lpsparse.{self.room}.{module}"), record)

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)


LAYOUTS = Family(  # how weights are stored
    "checkpoint.layouts", {"dense": "dense:DENSE", "bitmask": "bitmask:BITMASK", "packed": "packed:PACKED"}
)
RETIRED_LAYOUTS = Family(  # of compressed-tensors, which can only be read
    "checkpoint.layouts", {"sparse-bitmask": "retired:BY_ROWS", "sparse-24-bitmask": "retired:TWO_OF_FOUR"}
)
CONDITIONINGS = Family(
    "training.conditioning",
    {
        "rows": "rows:RowConditioning",
        "weight-norm": "weight_norm:WeightNorm",
        "l1-rows": "l1_rows:L1Rows",
        "spectral": "spectral:Spectral",
        "modular": "modular:Modular",
        "denoise": "denoise:Denoise",
    },
)
METHODS = Family(
    "training.methods",
    {
        "lp": "lp:Lp",
        "gradual": "gradual:Gradual",
        "one-shot": "one_shot:OneShot",
        "l1": "l1:L1",
        "dwf": "dwf:Dwf",
        "rigl": "rigl:Rigl",
        "dense": "dense:Dense",
    },
)
SCORES = Family("training", {"magnitude": "scores:MAGNITUDE", "fisher": "scores:FISHER"})
TASKS = Family(
    "training",
    {
        "causal-lm": "tasks:CAUSAL_LM",
        "masked-lm": "tasks:MASKED_LM",
        "text-classification": "tasks:TEXT_CLASSIFICATION",
        "image-classification": "tasks:IMAGE_CLASSIFICATION",
    },
)
CRITERIA = Family("pruning.criteria", {"magnitude": "magnitude:MAGNITUDE"})
BUDGETS = Family(
    "reporting.budgets",
    {
        "min-sparsity": "zeros:MIN_SPARSITY",
        "max-bytes": "cost:MAX_BYTES",
        "max-quality-drop": "cost:MAX_QUALITY_DROP",
        "max-layer-sparsity": "zeros:MAX_LAYER_SPARSITY",
        "min-nm": "zeros:MIN_NM",
    },
)
VIEWS = Family(  # what a report can be written as
    "reporting",
    {
        "json": "views:JSON",
        "html": "views:HTML",
        "markdown": "views:MARKDOWN",
        "comment": "views:COMMENT",
        "junit": "views:JUNIT",
        "csv": "views:CSV",
    },
)
HTML_VIEWS = Family(  # sections of the page, in their order
    "reporting.html",
    {
        "bytes": "storage:view",
        "layers": "layers:view",
        "types": "layers:kinds_view",
        "quality": "quality:quality_view",
        "magnitudes": "changes:magnitudes_view",
        "patterns": "patterns:view",
        "training": "quality:training_view",
        "changes": "changes:changes_view",
        "method": "method:view",
    },
)
