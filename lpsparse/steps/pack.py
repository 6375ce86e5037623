"""Settings of pack and unpack."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lpsparse.families import LAYOUTS
from lpsparse.steps.base import DRY_RUN, KEY, MODEL, OUT, OVERWRITE, THREADS, WEIGHTS, OneOf, Step


class PackStep(Step):
    """Store zeros as no bytes, losslessly."""

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    out: Path = OUT
    layout: Annotated[str, OneOf(LAYOUTS, but=("dense",))] = Field(
        "packed",
        description="packed is near the entropy bound; bitmask is the retired layout of compressed-tensors.",
    )
    level: Literal["fast", "default", "max"] = Field(
        "default", description="How much is tried to save more bytes, of packed."
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

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    out: Path = OUT
    threads: int | None = THREADS
    overwrite: bool = OVERWRITE
    dry_run: bool = DRY_RUN
