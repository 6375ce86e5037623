"""Settings of report, verify and inspect."""

from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from lpsparse.families import BUDGETS
from lpsparse.steps.base import EXCLUDE, INCLUDE, KEY, MODEL, THREADS, WEIGHTS, Fraction, Patterns, Step
from lpsparse.steps.budgets import with_budgets
from lpsparse.steps.prune import LOOK


def _levels(value: tuple[str, ...]) -> tuple[str, ...]:
    for each in value:
        if each not in (*BUDGETS, "baseline", "finite"):
            near = [f"; did you mean {name}?" for name in get_close_matches(each, BUDGETS, n=1)]
            expected = f"expected {', '.join(BUDGETS)}, finite or baseline"
            raise ValueError(f"--warn {each}: {expected}{''.join(near)}")
    return value


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


class ReportStep(with_budgets(Step)):
    """Measure sparsity and bytes from the files, and check budgets."""

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    base: str | None = Field(None, description="The checkpoint it came from, to compare with.")
    threads: int | None = THREADS
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    warn: Annotated[Patterns, AfterValidator(_levels)] = Field(
        (),
        description="Name of a budget that only warns; repeatable. `baseline`: those of --baseline; "
        "`finite`: NaN or Inf, which fails if there is any budget.",
    )
    baseline: Path | None = Field(
        None,
        description="Earlier report.json, or a folder with one: sparsity, bytes and quality must not "
        "get worse.",
    )
    max_regression: Fraction = Field(
        Decimal(0), ge=0, le=1, description="Allowed regression relative to --baseline, 0..1."
    )
    spectra: bool = Field(
        False, description="Largest and smallest singular value of each prunable matrix (slow)."
    )

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        """A gate whose budget was lost would always pass."""
        given = {name for name, kind in BUDGETS.items() if getattr(self, kind.field, ())}
        given |= {"baseline"} if self.baseline is not None else set()
        given |= {"finite"} if given else set()
        for name in self.warn:
            if name not in given:
                missing = f"--{name}" if name != "finite" else "a budget"
                raise ValueError(f"--warn {name}: {missing} is not given")
        if self.max_regression and self.baseline is None:
            raise ValueError(f"--max-regression {self.max_regression}: --baseline is not given")
        return self
