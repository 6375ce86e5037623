"""Settings of report, verify and inspect."""

from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from lpsparse.steps.base import EXCLUDE, INCLUDE, KEY, MODEL, THREADS, WEIGHTS, Fraction, Patterns, Step
from lpsparse.steps.budgets import BUDGETS, limit_of
from lpsparse.steps.prune import LOOK


def _texts(value: Any) -> Any:
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]


def _levels(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if each not in (*BUDGETS, "baseline", "finite"):
            near = [f"; did you mean {name}?" for name in get_close_matches(each, BUDGETS, n=1)]
            raise ValueError(f"--warn {each}: not {', '.join(BUDGETS)}, finite or baseline{''.join(near)}")
    return value


Limits = Annotated[
    tuple[str, ...],
    BeforeValidator(_texts),
    WithJsonSchema({"type": "array", "items": {"type": ["number", "string"]}}),
]


class VerifyStep(Step):
    """Check that a folder is what its manifest says: files, hashes, zeros, finiteness."""

    model: str = Field(min_length=1, description="Folder that lpsparse wrote, with its lpsparse.json.")
    source: str | None = Field(
        None,
        description="What it was cut from: names (but for one prefix), shapes and dtypes must be its, every "
        "value its bits or 0.",
    )
    key: str | None = Field(None, description="Table of tensors that is meant in SOURCE, a torch file.")
    threads: int | None = THREADS

    @model_validator(mode="after")
    def _key_of_source(self) -> Self:
        if self.key is not None and self.source is None:
            raise ValueError(f"--key {self.key} goes with SOURCE: MODEL is not a torch file")
        return self


class InspectStep(Step):
    """Say what a checkpoint holds, from its headers alone."""

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    look: bool = LOOK


class ReportStep(Step):
    """Measure sparsity and bytes from the files, and check budgets."""

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    base: str | None = Field(None, description="The checkpoint it came from, to compare with.")
    threads: int | None = THREADS
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    min_sparsity: Limits = Field(
        (),
        description="Budget [GLOB=]FRACTION: least sparsity of the prunable weights, or of all that match.",
    )
    max_bytes: Limits = Field(
        (), description="Budget [GLOB=]BYTES: most bytes of the weight files, or of tensors; 20MB, 1.5GiB."
    )
    max_quality_drop: Limits = Field(
        (),
        description="Budget: most that the quality recorded by finetune or `eval --save` may fall, in the "
        "metric's own unit, or in % of what it was.",
    )
    max_layer_sparsity: Limits = Field(
        (), description="Budget [GLOB=]FRACTION: most sparsity of any one prunable (or matching) tensor."
    )
    min_nm: Limits = Field(
        (),
        description="Budget [GLOB=]N:M=FRACTION: least share of groups of M that hold at most N non-zeros.",
    )
    warn: Annotated[Patterns, AfterValidator(_levels)] = Field(
        (),
        description="A budget, by its name, that only warns; repeatable. baseline: those of "
        "--baseline; finite: NaN or Inf, which fails where there is a budget.",
    )
    baseline: Path | None = Field(
        None,
        description="Earlier report.json, or a folder with one: sparsity, bytes and quality may be no "
        "worse than there.",
    )
    max_regression: Fraction = Field(
        Decimal(0), ge=0, le=1, description="Share by which they may be worse than --baseline."
    )
    spectra: bool = Field(
        False, description="Largest and smallest singular value of each prunable matrix (slow)."
    )

    @field_validator(*(name.replace("-", "_") for name in BUDGETS))
    @classmethod
    def _understood(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for each in value:
            limit_of(str(info.field_name).replace("_", "-"), each)
        return value

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        """A gate that lost what it is about would pass for ever."""
        given = {name for name in (*BUDGETS, "baseline") if getattr(self, name.replace("-", "_"))}
        given |= {"finite"} if given else set()
        for name in self.warn:
            if name not in given:
                missing = f"--{name}" if name != "finite" else "a budget"
                raise ValueError(f"--warn {name}: {missing} is not given")
        if self.max_regression and self.baseline is None:
            raise ValueError(f"--max-regression {self.max_regression}: --baseline is not given")
        return self
