"""Settings of report, verify and inspect."""

from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

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
        help="What it was cut from: names (but for one prefix), shapes and dtypes must be its, every "
        "value its bits or 0.",
        panel="Arguments",
        recorded=False,
        is_path=True,
        is_made=True,
    )
    key: str | None = Setting(
        None,
        help="Table of tensors that is meant in SOURCE, a torch file.",
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


class ReportStep(Step):
    """Measure sparsity and bytes from the files, and check budgets."""

    command: ClassVar[str] = "report"

    model: str = MODEL
    weights: str | None = WEIGHTS
    key: str | None = KEY
    base: str | None = Setting(
        None,
        help="The checkpoint it came from, to compare with.",
        panel="Arguments",
        recorded=False,
        is_path=True,
        is_made=True,
    )
    threads: int | None = THREADS
    include: Patterns = INCLUDE
    exclude: Patterns = EXCLUDE
    min_sparsity: Limits = Setting(
        (),
        help="Budget [GLOB=]FRACTION: least sparsity of the prunable weights, or of all that match.",
        panel="Budgets",
        metavar="LIMIT",
        headline=True,
    )
    max_bytes: Limits = Setting(
        (),
        help="Budget [GLOB=]BYTES: most bytes of the weight files, or of tensors; 20MB, 1.5GiB.",
        panel="Budgets",
        metavar="LIMIT",
        headline=True,
    )
    max_quality_drop: Limits = Setting(
        (),
        help="Budget: most that the quality recorded by finetune or `eval --save` may fall, in the "
        "metric's own unit, or in % of what it was.",
        panel="Budgets",
        metavar="LIMIT",
        headline=True,
    )
    max_layer_sparsity: Limits = Setting(
        (),
        help="Budget [GLOB=]FRACTION: most sparsity of any one prunable (or matching) tensor.",
        panel="Budgets",
        metavar="LIMIT",
    )
    min_nm: Limits = Setting(
        (),
        help="Budget [GLOB=]N:M=FRACTION: least share of groups of M that hold at most N non-zeros.",
        panel="Budgets",
        metavar="LIMIT",
    )
    warn: Annotated[Patterns, AfterValidator(_levels)] = Setting(
        (),
        help="A budget, by its name, that only warns; repeatable. baseline: those of "
        "--baseline; finite: NaN or Inf, which fails where there is a budget.",
        panel="Budgets",
        metavar="BUDGET",
    )
    baseline: Path | None = Setting(
        None,
        help="Earlier report.json, or a folder with one: sparsity, bytes and quality may be no "
        "worse than there.",
        panel="Budgets",
        is_path=True,
        is_made=True,
    )
    max_regression: Fraction = Setting(
        Decimal(0), ge=0, le=1, help="Share by which they may be worse than --baseline.", panel="Budgets"
    )
    spectra: bool = Setting(
        False, help="Largest and smallest singular value of each prunable matrix (slow).", panel="Reporting"
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
        return self
