"""Settings of report, verify and inspect."""

from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, model_validator

from lpsparse.families import BUDGETS
from lpsparse.steps.base import (
    EXCLUDE,
    INCLUDE,
    KEY,
    MODEL,
    THREADS,
    WEIGHTS,
    Fraction,
    Patterns,
    Setting,
    Step,
)
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

    command: ClassVar[str] = "verify"

    model: str = Setting(
        min_length=1,
        help="Folder that lpsparse wrote, with its lpsparse.json.",
        panel="Arguments",
        recorded=False,
        is_made=True,
    )
    source: str | None = Setting(
        None,
        help="Checkpoint that MODEL was cut from. Names (except one prefix), shapes and dtypes must be "
        "equal, and every value must be equal or 0.",
        panel="Arguments",
        recorded=False,
        is_path=True,
        is_made=True,
    )
    key: str | None = Setting(
        None,
        help="Table of tensors inside SOURCE, a torch file.",
        panel="Input",
        advanced=True,
        needs={"source": ()},
    )
    threads: int | None = THREADS


class InspectStep(Step):
    """Say what a checkpoint holds, from its headers alone."""

    command: ClassVar[str] = "inspect"

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    look: bool = LOOK


class ReportStep(with_budgets(Step)):
    """Measure sparsity and bytes from the files, and check budgets."""

    command: ClassVar[str] = "report"

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    base: str | None = Setting(
        None,
        help="Checkpoint that MODEL was made from, to compare with.",
        panel="Arguments",
        recorded=False,
        is_path=True,
        is_made=True,
    )
    threads: int | None = THREADS
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    warn: Annotated[Patterns, AfterValidator(_levels)] = Setting(
        (),
        help="Name of a budget that only warns; repeatable. `baseline`: the checks of --baseline. "
        "`finite`: NaN or Inf, which fails if any budget is given.",
        panel="Budgets",
        metavar="BUDGET",
    )
    baseline: Path | None = Setting(
        None,
        help="Earlier report.json, or a folder with one: sparsity, bytes and quality must not get worse.",
        panel="Budgets",
        is_path=True,
        is_made=True,
    )
    max_regression: Fraction = Setting(
        Decimal(0),
        ge=0,
        le=1,
        help="Allowed regression relative to --baseline, 0..1.",
        panel="Budgets",
        needs={"baseline": ()},
    )
    spectra: bool = Setting(
        False, help="Largest and smallest singular value of each prunable matrix (slow).", panel="Reporting"
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
        return self
