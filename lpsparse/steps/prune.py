"""Settings of prune."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from lpsparse.families import CRITERIA, LAYOUTS
from lpsparse.steps.base import (
    ALLOW_EMPTY,
    EXCLUDE,
    INCLUDE,
    KEY,
    MODEL,
    OUT,
    OVERWRITE,
    THREADS,
    WEIGHTS,
    Fraction,
    OneOf,
    Patterns,
    Setting,
    Step,
)


def _n_m(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('--n-m: write it in quotes in YAML, such as "2:4"')  # 2:4 is a time of day there
    n, _, m = str(value).partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 1024):
        raise ValueError(f"--n-m {value}: N:M with 0 < N < M <= 1024, such as 2:4")
    return f"{int(n)}:{int(m)}"


def _block(value: Any) -> Any:
    rows, _, columns = str(value).partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) > 0 and int(columns) > 0):
        raise ValueError(f"--block {value}: ROWSxCOLUMNS, such as 4x1 or 16x16")
    return f"{int(rows)}x{int(columns)}"


_COMPONENT = Setting(
    (),
    help="Glob of components to prune if MODEL is the folder of a diffusers pipeline; repeatable. The "
    "rest is copied.",
    panel="Selection",
    recorded=False,
)

LOOK = Setting(
    False,
    help="Build the model without values to ask transformers what each tensor is. Default: only if "
    "names and shapes leave it open.",
    panel="Selection",
    recorded=False,
    advanced=True,
)

_DRY_PRUNE = Setting(
    False,
    help="Show what would be zero, with disk, memory and time; write nothing. Needs only the headers "
    "of a hub id that is not in the cache.",
    panel="Output",
    local=True,
)


class PruneStep(Step):
    """Cut the smallest weights to exact zeros."""

    command: ClassVar[str] = "prune"
    rivals: ClassVar[tuple[str, ...]] = ("sparsity", "below", "gap", "n_m")  # one of them says how much

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    component: Patterns = _COMPONENT
    out: Path = OUT
    sparsity: Fraction | None = Setting(
        None,
        ge=0,
        le=1,
        help="Fraction of prunable weights to set to zero, 0..1, met exactly within each --scope.",
        aliases=("target_sparsity",),
        is_swept=True,
        headline=True,
    )
    below: float | None = Setting(
        None, ge=0, help="Set every weight with |w| below this to zero.", headline=True
    )
    gap: bool = Setting(
        False,
        help="Cut inside the empty band of magnitudes that decay with p < 1 leaves; exit 1 if there is none.",
        headline=True,
    )
    n_m: Annotated[str, BeforeValidator(_n_m)] | None = Setting(
        None, help="Keep at most the N largest of every M neighbours in a row, such as 2:4.", headline=True
    )
    scope: Literal["global", "tensor", "row"] = Setting(
        "global",
        help="Where --sparsity is met: over all tensors, in each tensor, or in each row.",
        needs={"sparsity": ()},
    )
    criterion: Annotated[str, OneOf(CRITERIA)] = Setting(
        "magnitude",
        help="What ranks weights, for --sparsity and --n-m; the lowest scores are cut.",
        advanced=True,
    )
    block: Annotated[str, BeforeValidator(_block)] | None = Setting(
        None,
        help="Cut blocks of ROWSxCOLUMNS with the smallest sum of magnitudes. --sparsity then counts blocks.",
    )
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    look: bool = LOOK
    allow_empty: bool = ALLOW_EMPTY
    layout: Annotated[str, OneOf(LAYOUTS)] = Setting(
        "dense", help="How the result is stored.", panel="Output"
    )
    threads: int | None = THREADS
    overwrite: bool = OVERWRITE
    dry_run: bool = _DRY_PRUNE

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [n for n, v in (("--sparsity", self.sparsity), ("--below", self.below)) if v is not None]
        given += ["--gap"] * self.gap + ["--n-m"] * (self.n_m is not None)
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of --sparsity, --below, --gap, --n-m (got {', '.join(given) or 'none'})"
            )
        if self.block is not None and (self.sparsity is None or self.scope == "row"):
            raise ValueError("--block goes with --sparsity, of --scope global or tensor")
        if self.criterion != "magnitude" and self.sparsity is None and self.n_m is None:
            raise ValueError(f"--criterion {self.criterion} goes with --sparsity or --n-m")
        if self.component and (self.overwrite or self.weights or self.key):
            raise ValueError("--component goes without --overwrite, --weights and --key")
        return self
