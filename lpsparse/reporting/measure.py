"""Measure a checkpoint from its files, in one streaming pass:
the source of every view and of every budget."""

from decimal import Decimal
from math import floor
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lpsparse.checkpoint.counting import Count, count_all
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.files import entries_of
from lpsparse.checkpoint.layouts import bitmask
from lpsparse.checkpoint.manifest import Quality, TensorRecord, digest, own_manifest
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.rescue import LAYOUTS
from lpsparse.checkpoint.rewrite import metadata_of
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.checkpoint.threads import parallel
from lpsparse.checkpoint.weights import Named, file_size
from lpsparse.pruning.prunable import choose


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Record):
    """Zeros among some weights. sparsity = zeros / weights, 0 where there are none."""

    of: str  # the denominator, in words
    weights: int
    zeros: int
    sparsity: float


class TensorRow(_Record):
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    prunable: bool
    reason: str
    weights: int
    zeros: int
    sparsity: float
    nonfinite: int
    stored_bytes: int
    dense_bytes: int


class Bytes(_Record):
    """The third denominator: what the weight files take on disk."""

    file_bytes: int  # weight files as they are, headers included
    dense_bytes: int  # tensors alone, stored densely
    zero_bytes: int  # bytes of exact zeros when stored densely
    zero_share: float  # zero_bytes / dense_bytes
    bitmask_bytes: int  # weight files in the bitmask layout, as `pack` writes them


class Base(_Record):
    """The checkpoint it came from, measured likewise."""

    name: str
    prunable: Share
    file_bytes: int
    bytes_ratio: float  # ours / theirs


class Budget(_Record):
    name: str
    limit: float
    value: float | None  # None: it was not measured
    passed: bool


class Estimate(_Record):
    """What a run would take, of which only a dry run is made."""

    disk_bytes: int  # OUT
    free_bytes: int  # on its disk
    memory_bytes: int  # of the process at its peak, without what the system caches of files
    seconds: float | None  # None where nothing was read that could be timed
    rule: str  # where these come from, in words


class Report(_Record):
    """What `lpsparse report` found. `schema_version` changes when a field changes its meaning."""

    schema_version: Literal[1] = 1
    model: str
    layout: str
    opens_with: str
    rule: str  # how weights were counted, in words
    prunable: Share
    all: Share
    bytes: Bytes
    tensors: tuple[TensorRow, ...]
    nonfinite_tensors: tuple[str, ...]
    quality: tuple[Quality, ...] = ()
    base: Base | None = None
    budgets: tuple[Budget, ...] = ()
    estimate: Estimate | None = None  # of a dry run alone

    @property
    def passed(self) -> bool:
        return all(budget.passed for budget in self.budgets)


_PACKED = (
    "lpsparse (load, unpack); transformers from_pretrained after `import lpsparse`, where config.json is "
    "beside it; ordinary loaders refuse it by its file name"
)
_OPENS = {
    "dense": "any safetensors reader; transformers from_pretrained where config.json is beside it",
    "bitmask": _PACKED,
    "packed": _PACKED,
    **dict.fromkeys(LAYOUTS, "lpsparse (load, unpack); compressed-tensors until 0.14, which wrote it"),
}


def measure(
    checkpoint: Checkpoint,
    chosen: dict[str, tuple[bool, str]] | None = None,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    name: str | None = None,
    quality: tuple[Quality, ...] = (),
    counts: dict[str, Count] | None = None,
) -> Report:
    """Count every value of every tensor, unless `counts` has them.
    `chosen` says what is prunable; by default the names and patterns do.
    """
    if chosen is None:
        chosen = prunable_of(checkpoint, include, exclude)
    rows: list[TensorRow] = []
    stored: dict[str, list[Named]] = {path.name: [] for path in checkpoint.files}  # in the bitmask layout
    counts = count_all(checkpoint) if counts is None else counts
    for tensor in checkpoint.tensors:
        counted = counts[tensor.name]
        rows.append(_row(tensor, counted, *chosen[tensor.name]))
        pays = bitmask.pays(tensor.dtype, tensor.shape, counted.stored)
        stored[tensor.file] += entries_of(tensor, counted, pays)
    packed_bytes = sum(
        file_size(entries, metadata_of(checkpoint, file, "bitmask")) for file, entries in stored.items()
    )
    rule = (
        f"exact zeros of either sign; prunable are {sum(row.prunable for row in rows)} of "
        f"{len(rows)} tensors; "
    )
    return Report(
        model=name or checkpoint.name, layout=checkpoint.layout, opens_with=_OPENS[checkpoint.layout],
        rule=rule + "a tied tensor counts once, as it is stored",
        prunable=_share("prunable weights", [row for row in rows if row.prunable]),
        all=_share("all weights", rows), bytes=_bytes(checkpoint, rows, packed_bytes), tensors=tuple(rows),
        nonfinite_tensors=tuple(row.name for row in rows if row.nonfinite), quality=quality,
    )  # fmt: skip


def prunable_of(
    checkpoint: Checkpoint, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> dict[str, tuple[bool, str]]:
    """What the manifest says is prunable, when lpsparse wrote
    the folder and no pattern is given; else the rule."""
    manifest = own_manifest(checkpoint)
    if manifest is not None and not include and not exclude:
        known = {record.name: (record.prunable, record.reason) for record in manifest.tensors}
        if all(tensor.name in known for tensor in checkpoint.tensors):
            return known
    return choose(((t.name, t.dtype, t.shape) for t in checkpoint.tensors), include, exclude, needed=False)


def _row(tensor: Tensor, counted: Count, prunable: bool, reason: str) -> TensorRow:
    return TensorRow(
        name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, layout=tensor.layout, prunable=prunable,
        reason=reason, weights=tensor.size, zeros=counted.zeros, sparsity=_ratio(counted.zeros, tensor.size),
        nonfinite=counted.nonfinite, stored_bytes=tensor.stored_bytes, dense_bytes=tensor.nbytes,
    )  # fmt: skip


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _share(of: str, rows: list[TensorRow]) -> Share:
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    return Share(of=of, weights=weights, zeros=zeros, sparsity=_ratio(zeros, weights))


def _bytes(checkpoint: Checkpoint, rows: list[TensorRow], packed_bytes: int) -> Bytes:
    dense = sum(row.dense_bytes for row in rows)
    zero = sum(row.zeros * DTYPES[row.dtype].bits // 8 for row in rows)
    return Bytes(
        file_bytes=checkpoint.file_bytes, dense_bytes=dense, zero_bytes=zero,
        zero_share=_ratio(zero, dense), bitmask_bytes=packed_bytes,
    )  # fmt: skip


def compare(report: Report, base: Report) -> Report:
    """`report` with the figures of the checkpoint it came from beside it."""
    ratio = _ratio(report.bytes.file_bytes, base.bytes.file_bytes)
    beside = Base(
        name=base.model, prunable=base.prunable, file_bytes=base.bytes.file_bytes, bytes_ratio=ratio
    )
    return report.model_copy(update={"base": beside})


def check_budgets(
    report: Report, min_sparsity: float | None, max_bytes: int | None, max_quality_drop: float | None
) -> Report:
    """`report` with a verdict for each budget given; a quality that nobody recorded fails its budget."""
    budgets: list[Budget] = []
    if min_sparsity is not None:
        share = report.prunable
        asked = floor(Decimal(str(min_sparsity)) * share.weights)  # as many as `prune --sparsity` would leave
        passed = share.zeros >= asked
        budgets.append(Budget(name="min-sparsity", limit=min_sparsity, value=share.sparsity, passed=passed))
    if max_bytes is not None:
        size = report.bytes.file_bytes
        budgets.append(Budget(name="max-bytes", limit=max_bytes, value=size, passed=size <= max_bytes))
    if max_quality_drop is not None:
        drops = [quality_drop(quality) for quality in report.quality]
        drop = max((d for d in drops if d is not None), default=None)
        passed = drop is not None and drop <= max_quality_drop
        budgets.append(Budget(name="max-quality-drop", limit=max_quality_drop, value=drop, passed=passed))
    return report.model_copy(update={"budgets": tuple(sorted(budgets, key=lambda budget: budget.passed))})


def quality_drop(quality: Quality) -> float | None:
    """How much worse `after` is than `before`, in the metric's unit; negative when better."""
    if quality.before is None:
        return None
    change = quality.after - quality.before
    return -change if quality.higher_is_better else change


def tensor_records(report: Report) -> tuple[TensorRecord, ...]:
    """The manifest's lines for the tensors that were measured."""
    return tuple(
        TensorRecord(
            name=row.name, dtype=row.dtype, shape=row.shape, layout=row.layout, prunable=row.prunable,
            reason=row.reason, zeros=row.zeros,
            finite=row.nonfinite == 0 if DTYPES[row.dtype].is_float else None,
        )
        for row in report.tensors
    )  # fmt: skip


def own_quality(checkpoint: Checkpoint) -> tuple[Quality, ...]:
    """Quality that was recorded of these very weights, by their hashes; none where there is no record."""
    manifest = own_manifest(checkpoint)
    if manifest is None or checkpoint.root is None:
        return ()
    files = {record.name: record for record in manifest.files}
    root = checkpoint.root
    found = parallel(lambda path: digest(path, root), checkpoint.files)
    return manifest.quality if all(record == files.get(record.name) for record in found) else ()
