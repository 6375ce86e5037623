"""What commands other than a report return: typed, frozen, and as JSON the same keys as ever."""

from dataclasses import asdict, dataclass
from typing import Any

from lpsparse.reporting.records import Estimate


class Result:
    """A frozen record. `result["key"]` reads it like the dictionary that 0.1 returned."""

    __slots__ = ()

    def as_data(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self)  # pyright: ignore[reportArgumentType]  # each subclass is a dataclass

    def __getitem__(self, key: str) -> Any:
        return self.as_data()[key]

    def __contains__(self, key: str) -> bool:
        return key in self.as_data()


@dataclass(frozen=True, slots=True)
class Verification(Result):
    """Whether a folder is what its manifest says."""

    ok: bool
    files: int
    tensors: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileSize:
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """A tensor as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    layout: str
    bytes: int  # as it is stored
    prunable: bool
    reason: str
    role: str
    told_by: str


@dataclass(frozen=True, slots=True)
class Listing(Result):
    """What a checkpoint holds."""

    model: str
    revision: str | None
    layout: str
    files: tuple[FileSize, ...]
    weights: int  # values of all tensors
    prunable_weights: int
    tensors: tuple[TensorFacts, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorOutlook:
    """A tensor as its header describes it, and the fewest zeros that a cut would leave; None: not known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    bytes: int
    prunable: bool
    reason: str
    zeros_at_least: int | None


@dataclass(frozen=True, slots=True)
class RemotePreview(Result):
    """What the headers of a checkpoint that is not here say of a cut."""

    model: str
    revision: str | None
    from_headers_alone: bool
    files: tuple[FileSize, ...]
    download_bytes: int
    weights: int
    prunable_weights: int
    zeros_at_least: int | None
    estimate: Estimate
    tensors: tuple[TensorOutlook, ...]

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"estimate": self.estimate.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class TrainingPreview(Result):
    """What a training run would do."""

    model: str
    bytes_kept: int  # of memory, from step to step
    bytes_peak: int
    method: str
    steps: int
    examples: int
    held_out: int
    processes: int
    prunable_weights: int
    prunable_tensors: int
    zeros: int | None  # of the target
    kept: str
    fresh: tuple[str, ...]  # tensors that MODEL lacks
    warning: str | None
    disk_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class UploadPreview(Result):
    """What a push would send."""

    repo: str
    files: int
    bytes: int
    names: tuple[FileSize, ...]
    not_sent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Upload(Result):
    """A commit on the hub."""

    url: str
    commit: str
    files: int
    bytes: int
    repo: str
    revision: str
    private: bool
    new: bool  # the repository was made
    changed: bool  # else all of it was there
    deleted: tuple[str, ...]
    pull_request: str | None


@dataclass(frozen=True, slots=True)
class Figure:
    """Quality on the rows that were measured; errors are standard errors of the mean."""

    loss: float
    loss_error: float
    accuracy: float | None = None
    accuracy_error: float | None = None

    def as_data(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Evaluation(Result):
    """How good a model is on data."""

    model: str
    task: str
    split: str
    trained_on: tuple[str, ...] | None  # names of these files that it was trained on; None: not known
    figure: Figure
    count: int
    unit: str  # of count
    pixels: str | None = None
    against: str | None = None  # the dense model
    before: Figure | None = None  # its quality
    saved: str | None = None  # where it was recorded
    saves: bool = False

    def as_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            name: getattr(self, name) for name in ("model", "task", "split", "trained_on")
        }
        data |= {**self.figure.as_data(), self.unit: self.count}
        data |= {} if self.pixels is None else {"pixels": self.pixels}
        if self.before is not None:
            before = {f"before_{key}": value for key, value in self.before.as_data().items()}
            data |= {"against": self.against, **before}
        return data | ({"saved": self.saved} if self.saves else {})
