"""What report.json holds: plain, frozen data, of which every view is made."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from lpsparse.checkpoint.manifest import OF_EACH, EarlierStep, FileRecord, Quality
from lpsparse.pruning.roles import bare, is_head


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _some(part: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= part[0] <= part[1] or not part[1]:
        raise ValueError(f"{part[0]} of {part[1]}")
    return part


Part = Annotated[tuple[int, int], AfterValidator(_some)]  # how many, of how many


class Share(Record):
    """Zeros among some weights. sparsity = zeros / weights, 0 where there are none."""

    of: str  # the denominator, in words
    weights: int
    zeros: int
    sparsity: float


@dataclass(frozen=True, slots=True, config=OF_EACH)
class Histogram:
    """Non-zero finite magnitudes by powers of two: counts[i] are those with 2**(first + i) <= |w| <
    2**(first + i + 1). The subnormal ones of a dtype are all in the bin under its smallest normal ones."""

    first: int = Field(ge=-1100, le=1100)
    counts: tuple[int, ...] = Field(max_length=2200)


@dataclass(frozen=True, slots=True, config=OF_EACH)
class Detail:
    """What is in a tensor of floats, beside its zeros."""

    negative_zeros: int  # of the zeros
    subnormal: int
    near_zero: int  # non-zero, and under 2**-10 of the power of two of the largest magnitude
    nan: int
    inf: int
    smallest: float | None  # non-zero finite magnitude; None where there is none
    largest: float | None
    histogram: Histogram
    n_m: dict[str, Part]  # "2:4": (groups of 4 neighbours with at most 2 non-zeros, all groups)
    empty: dict[str, Part]  # "rows", "columns", "heads", "blocks 4x4": (all zero, all of them)
    bound_bytes: int  # order-0 bound: entropy of where zeros are and of exponents, other bits as they are


@dataclass(frozen=True, slots=True, config=OF_EACH)
class Spectrum:
    """Singular values of a matrix (of more dimensions: rows by the rest)."""

    largest: float
    smallest: float
    condition: float | None  # largest / smallest; None where the smallest is 0


@dataclass(frozen=True, slots=True, config=OF_EACH)
class Change:
    """A tensor beside that of the same name in BASE."""

    cut: int  # zero here, not there
    revived: int  # not zero here, zero there
    changed: int  # zero in neither, other values
    largest_cut: float | None  # magnitude in BASE of what was cut
    smallest_kept: float | None  # and of what was not
    largest_change: float  # |ours - theirs|, of values that are zero in neither
    at: int | None  # place of that value in the tensor, in row-major order
    before: float | None
    after: float | None
    distance: (
        float | None
    )  # root of the sum of squared changes, over that of BASE's squares; None: NaN or Inf


@dataclass(frozen=True, slots=True, config=OF_EACH)
class TensorRow:
    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str  # layer type, by its name: a key of kinds.KINDS
    layout: str
    prunable: bool
    reason: str
    weights: int
    zeros: int  # of either sign
    sparsity: float
    nonfinite: int
    stored_bytes: int
    dense_bytes: int
    detail: Detail | None = None  # None: only zeros were counted, or it holds no floats
    spectrum: Spectrum | None = None
    change: Change | None = None

    def groups(self, n_m: str) -> tuple[int, int]:
        """How many groups meet N:M, and how many there are. None of a tensor whose rows are not made of
        complete groups does: no runtime accepts it as N:M."""
        known = self.detail.n_m.get(n_m) if self.detail else None
        return known or (0, -(-self.weights // int(n_m.partition(":")[2])))


class KindRow(Record):
    """All tensors of one layer type."""

    kind: str
    tensors: int
    prunable: int  # of the tensors
    weights: int
    share: float  # of all weights
    zeros: int
    sparsity: float
    stored_bytes: int


class Bytes(Record):
    """The third denominator: what the weight files take on disk."""

    file_bytes: int  # weight files as they are, headers included
    dense_bytes: int  # tensors alone, stored densely
    zero_bytes: int  # bytes of exact zeros when stored densely
    zero_share: float  # zero_bytes / dense_bytes
    bitmask_bytes: int  # weight files in the bitmask layout, as `pack --layout bitmask` writes them
    packed_bytes: int | None = None  # about what `pack` writes; exact where it is packed


class Base(Record):
    """The checkpoint that it is compared with, measured likewise."""

    name: str
    is_source: bool  # by the hashes that the manifest has of what it was made from
    prunable: Share
    file_bytes: int
    dense_bytes: int
    bytes_ratio: float  # ours / theirs
    histogram: Histogram | None  # of the prunable weights
    only_here: tuple[str, ...]  # names of tensors
    only_there: tuple[str, ...]  # as BASE has them
    other_form: tuple[str, ...]  # of another shape, likewise
    left_behind: tuple[str, ...] = ()  # of these two: heads that another class has no place for


class Budget(Record):
    name: str
    pattern: str | None = None  # glob of the tensors that it is of; None: see the name
    limit: float
    relative: bool = False  # limit, value and margin are shares of the quality before
    value: float | None  # None: it was not measured
    baseline: float | None = None  # what the report has whose regression the limit bounds
    margin: float | None = None  # how much better than the limit, in its unit; negative when it fails
    level: Literal["error", "warn"] = "error"
    passed: bool
    worst: str | None = None  # the tensor that decides, where one does


class Estimate(Record):
    """What a run would take, of which only a dry run is made."""

    disk_bytes: int  # OUT
    free_bytes: int  # on its disk
    memory_bytes: int  # of the process at its peak, without what the system caches of files
    seconds: float | None  # None where nothing was read that could be timed
    rule: str  # where these come from, in words


class Point(Record):
    """A line of metrics.jsonl."""

    step: int
    loss: float
    lr: float
    lambda_p: float
    sparsity: float


class Made(Record):
    """What lpsparse.json says of how the folder was made."""

    lpsparse: str  # version
    source: str
    revision: str | None
    base: str  # the model that the chain of steps began with
    recipe: dict[str, Any]
    earlier: tuple[EarlierStep, ...] = ()  # steps that led to the source, first to last
    files: tuple[FileRecord, ...]  # weight files
    notes: tuple[str, ...]


class Identity(Record):
    """What two reports must share to be compared."""

    base_sha256: str | None  # of the weights that the chain of steps began with; None: unknown
    prunable_sha256: str  # of the names and sizes of what was counted as prunable


class Report(Record):
    """What `lpsparse report` found. `schema_version` changes when a field changes its meaning."""

    schema_version: Literal[1] = 1
    model: str  # its name; in OUT's own report.json that of what OUT was made from
    layout: str
    opens_with: str
    rule: str  # how weights were counted, in words
    prunable: Share  # of the weights that may be cut
    all: Share  # of the values of all tensors: embeddings, norms, biases, integer buffers and statistics too
    bytes: Bytes
    tensors: tuple[TensorRow, ...]
    kinds: tuple[KindRow, ...] = ()
    n_m: dict[str, Part] = {}  # sums over the prunable tensors; one of rows without whole groups meets none
    empty: dict[str, Part] = {}
    histogram: Histogram | None = None  # of the prunable weights
    nonfinite_tensors: tuple[str, ...]
    quality: tuple[Quality, ...] = ()
    base: Base | None = None
    budgets: tuple[Budget, ...] = ()  # failed first
    baseline: str | None = None  # the report that the budgets called "... of baseline" come from
    training: tuple[Point, ...] = ()
    made: Made | None = None
    identity: Identity | None = None
    not_measured: tuple[str, ...] = ()
    estimate: Estimate | None = None  # of a dry run alone

    @property
    def passed(self) -> bool:
        """Whether no budget failed that is more than a warning."""
        return all(budget.passed or budget.level == "warn" for budget in self.budgets)

    def as_data(self) -> dict[str, Any]:
        """Plain data, as report.json holds it."""
        return self.model_dump(mode="json")


def schema() -> str:
    """JSON Schema of report.json."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"


OTHER = "other"


_TAIL = 200  # letters of a name that are looked at: a hostile one may have millions


_PATTERNS = (  # in this order, the first that is found
    ("bias", r"(^|[._])bias$"),
    ("norm", r"norm|(^|[._])(ln|bn)[._\df]"),
    ("embedding", r"embed|(^|[._])(wte|wpe)[._]"),
    ("attention q, k, v", r"qkv|query_key_value|c_attn|in_proj"),
    ("attention q", r"(^|[._])(q|wq|query)(_proj|_lin)?[._]"),
    ("attention k", r"(^|[._])(k|wk|key)(_proj|_lin)?[._]"),
    ("attention v", r"(^|[._])(v|wv|value)(_proj|_lin)?[._]"),
    ("attention out", r"(^|[._])(o_proj|wo)[._]|att.*[._](dense|proj|out_proj|c_proj|out_lin|to_out)[._]"),
    (
        "mlp",
        r"mlp|ffn|feed_forward|expert|intermediate|output\.dense|(gate|up|down)_proj"
        r"|[._](w[123]|fc\d|lin\d|c_fc)[._]",
    ),
    ("convolution", r"conv|downsample"),
    ("pooler", r"pooler"),
)


ATTENTION_ROWS = ("attention q", "attention k", "attention v", "attention q, k, v")  # heads are rows


KINDS = (  # in the order of tables and colours
    "bias",
    "norm",
    ATTENTION_ROWS[-1],
    *ATTENTION_ROWS[:-1],
    "attention out",
    "mlp",
    "embedding",
    "head",
    "convolution",
    "pooler",
    OTHER,
)


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """One of KINDS. A wrong guess puts a tensor into a wrong line of a table, no more."""
    tail = bare(name[-_TAIL:]).lower()
    found = next((kind for kind, pattern in _PATTERNS if re.search(pattern, tail)), OTHER)
    if found not in ("bias", "norm", "embedding", "pooler") and is_head(tail):
        return "head"
    return "convolution" if found == OTHER and len(shape) == 4 else found
