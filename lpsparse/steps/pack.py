"""Settings of pack and unpack."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from lpsparse.families import LAYOUTS
from lpsparse.steps.base import DRY_RUN, KEY, MODEL, OUT, OVERWRITE, THREADS, WEIGHTS, OneOf, Setting, Step


class PackStep(Step):
    """Store zeros as no bytes, losslessly."""

    command: ClassVar[str] = "pack"
    restores: ClassVar[bool] = True

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    out: Path = OUT
    layout: Annotated[str, OneOf(LAYOUTS, but=("dense",))] = Setting(
        "packed",
        help="packed is near the entropy bound; bitmask is the retired layout of compressed-tensors.",
        panel="Output",
    )
    level: Literal["fast", "default", "max"] = Setting(
        "default", help="Effort to save bytes, with --layout packed.", panel="Output", advanced=True
    )
    threads: int | None = THREADS
    overwrite: bool = OVERWRITE
    dry_run: bool = DRY_RUN

    @model_validator(mode="after")
    def _level_of_packed(self) -> Self:
        if self.level != "default" and not LAYOUTS[self.layout].has_levels:
            raise ValueError(f"--level {self.level} goes with --layout packed")
        return self


class UnpackStep(Step):
    """Turn a packed model back into an ordinary dense one, bit for bit."""

    command: ClassVar[str] = "unpack"
    restores: ClassVar[bool] = True

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    out: Path = OUT
    threads: int | None = THREADS
    overwrite: bool = OVERWRITE
    dry_run: bool = DRY_RUN
