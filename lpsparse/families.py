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
TASKS = Family(
    "training.tasks",
    {
        "causal-lm": "causal_lm:prepare",
        "masked-lm": "masked_lm:prepare",
        "text-classification": "text_classification:prepare",
        "image-classification": "image_classification:prepare",
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
