"""Measure a checkpoint from its files in one streaming pass, for all views and budgets."""

import hashlib
from dataclasses import replace

from lpsparse.checkpoint.counting import Count
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.layouts import packed
from lpsparse.checkpoint.layouts.base import layout_of
from lpsparse.checkpoint.layouts.retired import config_of
from lpsparse.checkpoint.manifest import Manifest, Quality, TensorRecord, digest, own_manifest
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Tensor
from lpsparse.checkpoint.write import metadata_of
from lpsparse.families import LAYOUTS
from lpsparse.parallel.threads import parallel
from lpsparse.pruning.targets import Chosen, Decision, choose, recorded
from lpsparse.reporting.bound import sampled_bytes
from lpsparse.reporting.budgets.zeros import N_M
from lpsparse.reporting.records import (
    KINDS,
    Base,
    Bytes,
    Change,
    Detail,
    Histogram,
    Identity,
    KindRow,
    Made,
    Report,
    Share,
    TensorRow,
    kind_of,
)
from lpsparse.reporting.survey import survey

_HEAD_BYTES, _CHUNK_BYTES = 56, 40  # of a packed tensor, about, beside the order-0 bound of what is in it
_TRANSFORMERS = "transformers from_pretrained"
_LIBRARIES = {  # a key of config.json, and who has it
    "_diffusers_version": "diffusers from_pretrained",
    "model_type": _TRANSFORMERS,
    "architectures": _TRANSFORMERS,
    "pretrained_cfg": "timm create_model",
}
_TORCH = "torch.load, as it is a torch file; lpsparse, which runs nothing of it; no safetensors reader"


def measure(
    checkpoint: Checkpoint,
    chosen: Chosen | None = None,
    *,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    name: str | None = None,
    quality: tuple[Quality, ...] = (),
    counts: dict[str, Count] | None = None,
    patterns: bool = True,
) -> Report:
    """Read every value of every tensor, unless `counts` has the zeros: then the report has nothing more.
    `chosen` says what is prunable; by default names and patterns do. `patterns`: look for patterns of zeros.
    """
    if chosen is None:
        chosen = prunable_of(checkpoint, include, exclude)
    rows: list[TensorRow] = []
    bitmask_bytes = 0
    counts, details = (
        (counts, dict[str, Detail]()) if counts is not None else survey(checkpoint, patterns=patterns)
    )
    for tensor in checkpoint.tensors:
        rows.append(_row(tensor, counts[tensor.name], details.get(tensor.name), chosen[tensor.name]))
    for file, tensors in checkpoint.by_file.items():
        metadata = metadata_of(checkpoint, file, "bitmask", tensors)
        bitmask_bytes += LAYOUTS["bitmask"].plan(tensors, counts, lambda _: None, metadata, "").file_bytes
    rule = (
        f"exact zeros of either sign; prunable are {sum(row.prunable for row in rows)} of "
        f"{len(rows)} tensors; all weights are the values of all tensors, integers and statistics too; "
    )
    prunable = [row for row in rows if row.prunable]
    return Report(
        model=name or checkpoint.name,
        layout=checkpoint.layout,
        opens_with=_opens_with(checkpoint),
        rule=rule + "a tied tensor counts once, as it is stored",
        prunable=_share("prunable weights", prunable),
        all=_share("all weights", rows),
        bytes=_bytes(checkpoint, rows, counts, bitmask_bytes),
        tensors=tuple(rows),
        kinds=_kinds(rows),
        n_m=_together([_n_m(row) for row in prunable if row.detail and row.weights]),
        empty=_together([row.detail.empty for row in prunable if row.detail]),
        histogram=_histogram(prunable),
        nonfinite_tensors=tuple(row.name for row in rows if row.nonfinite),
        quality=quality,
    )


def _opens_with(checkpoint: Checkpoint) -> str:
    """The readers that open these files. config.json says which library builds the model."""
    if checkpoint.is_torch:
        return _TORCH
    config = config_of(checkpoint.root)
    by = next((library for key, library in _LIBRARIES.items() if key in config), "")
    if (
        by and checkpoint.layout != "dense"
    ):  # a loader for packed folders is registered with transformers alone
        by = f"{by} after `import lpsparse`" if by == _TRANSFORMERS else ""
    return layout_of(checkpoint.layout).opens_with.format(f"; {by}" if by else "")


def prunable_of(
    checkpoint: Checkpoint,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    *,
    strict: bool = True,
    always_look: bool = False,
) -> Chosen:
    """The prunable tensors by the manifest, if lpsparse wrote the folder and no pattern is given; else by the
    rule. If `strict`, raises UsageError for a pattern that matches nothing."""
    manifest = own_manifest(checkpoint)
    if manifest is not None and not include and not exclude and not always_look:
        known = {each.name: recorded(each.prunable, each.reason) for each in manifest.tensors}
        if all(tensor.name in known for tensor in checkpoint.tensors):
            return known
    return choose(checkpoint, include, exclude, needed=False, strict=strict, always_look=always_look)


def _row(tensor: Tensor, counted: Count, detail: Detail | None, decision: Decision) -> TensorRow:
    return TensorRow(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        kind=kind_of(tensor.name, tensor.shape),
        layout=tensor.layout,
        prunable=decision.prunable,
        detail=detail,
        reason=decision.reason,
        weights=tensor.size,
        zeros=counted.zeros,
        sparsity=_ratio(counted.zeros, tensor.size),
        nonfinite=counted.nonfinite,
        stored_bytes=tensor.stored_bytes,
        dense_bytes=tensor.nbytes,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _share(of: str, rows: list[TensorRow]) -> Share:
    weights, zeros = sum(row.weights for row in rows), sum(row.zeros for row in rows)
    return Share(of=of, weights=weights, zeros=zeros, sparsity=_ratio(zeros, weights))


def _kinds(rows: list[TensorRow]) -> tuple[KindRow, ...]:
    every = sum(row.weights for row in rows)
    found: list[KindRow] = []
    for kind in KINDS:
        some = [row for row in rows if row.kind == kind]
        share = _share(kind, some)
        if some:
            found.append(
                KindRow(
                    kind=kind,
                    tensors=len(some),
                    prunable=sum(row.prunable for row in some),
                    weights=share.weights,
                    share=_ratio(share.weights, every),
                    zeros=share.zeros,
                    sparsity=share.sparsity,
                    stored_bytes=sum(row.stored_bytes for row in some),
                )
            )
    return tuple(found)


def _n_m(row: TensorRow) -> dict[str, tuple[int, int]]:
    return {name: row.groups(name) for name in N_M}


def _together(tables: list[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for table in tables:
        for name, (part, whole) in table.items():
            before = found.get(name, (0, 0))
            found[name] = (before[0] + part, before[1] + whole)
    return dict(sorted(found.items()))


def _histogram(rows: list[TensorRow]) -> Histogram | None:
    given = [row.detail.histogram for row in rows if row.detail]
    some = [each for each in given if each.counts]
    if not some:
        return None
    first = min(each.first for each in some)
    counts = [0] * (max(each.first + len(each.counts) for each in some) - first)
    for each in some:
        for i, count in enumerate(each.counts, each.first - first):
            counts[i] += count
    return Histogram(first=first, counts=tuple(counts))


def _bytes(
    checkpoint: Checkpoint, rows: list[TensorRow], counts: dict[str, Count], bitmask_bytes: int
) -> Bytes:
    dense = sum(row.dense_bytes for row in rows)
    zero = sum(row.zeros * DTYPES[row.dtype].bits // 8 for row in rows)
    return Bytes(
        file_bytes=checkpoint.file_bytes,
        dense_bytes=dense,
        zero_bytes=zero,
        zero_share=_ratio(zero, dense),
        bitmask_bytes=bitmask_bytes,
        packed_bytes=_packed(checkpoint, rows, counts),
    )


def _packed(checkpoint: Checkpoint, rows: list[TensorRow], counts: dict[str, Count]) -> int | None:
    """About the bytes of the weight files that `pack` would write; None if another layout would have to be
    decoded for it."""
    if checkpoint.layout == "packed":
        return checkpoint.file_bytes
    if checkpoint.layout != "dense" and not any(row.detail for row in rows):
        return None
    headers = sum(
        packed.room(tensors, metadata_of(checkpoint, file, "packed", tensors))
        for file, tensors in checkpoint.by_file.items()
    )
    both = zip(rows, checkpoint.tensors, strict=True)
    return headers + sum(_packed_tensor(row, tensor, counts[row.name]) for row, tensor in both)


def _packed_tensor(row: TensorRow, tensor: Tensor, counted: Count) -> int:
    if not row.weights or not DTYPES[row.dtype].is_float:
        return row.dense_bytes
    bound = sampled_bytes(tensor, counted) if row.detail is None else row.detail.bound_bytes
    size = bound + _HEAD_BYTES + _CHUNK_BYTES * -(-row.dense_bytes // BLOCK_BYTES)
    return size if packed.pays(size, row.dense_bytes, len(row.shape)) else row.dense_bytes


def compare(
    report: Report,
    base: Report,
    changed: dict[str, Change],
    names: dict[str, str],
    left_behind: tuple[str, ...],
    *,
    is_source: bool,
) -> Report:
    """`report` with the figures of BASE beside it. `names` maps BASE's names to ours, of shared tensors."""
    ours = {row.name: row.shape for row in report.tensors}
    alone = (row.name for row in base.tensors if row.name not in names)
    other = (row.name for row in base.tensors if row.name in names and ours[names[row.name]] != row.shape)
    beside = Base(
        name=base.model,
        is_source=is_source,
        prunable=base.prunable,
        file_bytes=base.bytes.file_bytes,
        dense_bytes=base.bytes.dense_bytes,
        bytes_ratio=_ratio(report.bytes.file_bytes, base.bytes.file_bytes),
        histogram=base.histogram,
        only_here=tuple(sorted(ours.keys() - names.values())),
        only_there=tuple(sorted(alone)),
        other_form=tuple(sorted(other)),
        left_behind=left_behind,
    )
    rows = tuple(replace(row, change=changed.get(row.name)) for row in report.tensors)
    return report.model_copy(update={"base": beside, "tensors": rows})


def beside_base(quality: tuple[Quality, ...], of_base: tuple[Quality, ...], name: str) -> tuple[Quality, ...]:
    """`quality` with BASE's record as before, if it has the same data. Training may have started from another
    model, such as one that was cut already."""
    known = {(each.metric, each.data_sha256): each for each in of_base}
    found: list[Quality] = []
    for each in quality:
        base = known.get((each.metric, each.data_sha256))
        if base is not None and base.data_sha256 is not None:
            before = {"before": base.after, "before_error": base.after_error, "of_base": name}
            each = each.model_copy(update={**before, "of_cut": False})
        found.append(each)
    return tuple(found)


def identity_of(report: Report, base_sha256: str | None) -> Identity:
    """The hashes that another report must share to be comparable; `base_sha256` is the source's."""
    counted = sorted((row.name, row.weights) for row in report.tensors if row.prunable)
    return Identity(
        base_sha256=base_sha256,
        prunable_sha256=hashlib.sha256(repr(counted).encode("utf-8", "surrogatepass")).hexdigest(),
    )


def not_measured(report: Report) -> tuple[str, ...]:
    """Sentences about what was not measured, so that nobody infers it from the rest."""
    said = ["speed: nothing was timed; zeros are faster only in a runtime that uses them"]
    if not report.quality:
        said.append("quality: not recorded for these weights (`finetune` and `eval --save` record it)")
    elif any(each.of_cut for each in report.quality):
        said.append(
            "quality lost by the cut: BASE has no record for the same data; `before` is after the cut"
        )
    if report.base is None:
        said.append("changes: no BASE was given")
    if not any(row.spectrum for row in report.tensors):
        said.append("singular values: --spectra was not given")
    return tuple(said)


def made_by(manifest: Manifest, files: set[str]) -> Made:
    """How the folder was made, by its manifest; `files` are its weight files."""
    source = manifest.source
    return Made(
        lpsparse=manifest.lpsparse,
        source=source.name,
        revision=source.revision,
        base=source.base,
        recipe=manifest.recipe,
        earlier=manifest.earlier,
        notes=manifest.notes,
        files=tuple(each for each in manifest.files if each.name in files),
    )


def tensor_records(report: Report) -> tuple[TensorRecord, ...]:
    """The manifest's records of the measured tensors."""
    return tuple(
        TensorRecord(
            name=row.name,
            dtype=row.dtype,
            shape=row.shape,
            layout=row.layout,
            prunable=row.prunable,
            reason=row.reason,
            zeros=row.zeros,
            finite=row.nonfinite == 0 if DTYPES[row.dtype].is_float else None,
        )
        for row in report.tensors
    )


def own_quality(checkpoint: Checkpoint) -> tuple[Quality, ...]:
    """The quality that was recorded for exactly these weights, by their hashes."""
    manifest = own_manifest(checkpoint)
    if manifest is None or checkpoint.root is None:
        return ()
    files = {record.name: record for record in manifest.files}
    root = checkpoint.root
    found = parallel(lambda path: digest(path, root), checkpoint.files)
    return manifest.quality if all(record == files.get(record.name) for record in found) else ()
