"""Estimate the output, disk, memory and time of a run, for --dry-run."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from lpsparse.checkpoint.counting import Count, Cuts
from lpsparse.checkpoint.files import find_sidecars
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.tensors import BLOCK_BYTES
from lpsparse.checkpoint.write import WAITING, metadata_of
from lpsparse.families import LAYOUTS
from lpsparse.parallel.threads import cores
from lpsparse.pruning.targets import Chosen
from lpsparse.reporting.measure import measure
from lpsparse.reporting.records import Estimate, Report

# Peaks of anonymous memory, measured on 2 cores: 1 and 4 files of BF16, F32 and F64, each rule of `prune`.
PROCESS_BYTES = 32 << 20  # Python and numpy
_BLOCKS = 10  # what a thread holds at a time: bits, their order, masks and ranks, what it counts and writes
_TORCH_BYTES = 256 << 20
_KEPT_BYTES = 4096  # of a tensor, in memory: its name, shape, counts, and the report's line
_TOLD_BYTES = 900  # of a tensor, in OUT: lines of manifest, report and index
_PROBE_BYTES = 16 << 20


def report_of(
    source: Checkpoint,
    chosen: Chosen,
    counts: dict[str, Count],
    layout: str,
    cut: Cuts = lambda _: None,
    level: str = "default",
) -> Report:
    """The report of OUT, if `source` were written in `layout` after `cut`, which leaves these `counts`."""
    by_file = source.by_file
    metadata = {file: metadata_of(source, file, layout, tensors) for file, tensors in by_file.items()}
    plans = [
        LAYOUTS[layout].plan(tensors, counts, cut, metadata[file], level) for file, tensors in by_file.items()
    ]
    stored = {name: size for plan in plans for name, size in plan.stored.items()}
    tensors = tuple(
        replace(tensor, layout=layout, stored_bytes=stored[tensor.name])
        if tensor.name in stored
        else replace(tensor, layout="dense", stored_bytes=tensor.nbytes)
        for tensor in source.tensors
    )
    found = measure(replace(source, tensors=tensors, metadata=metadata), chosen, counts=counts)
    size = sum(plan.file_bytes for plan in plans)
    told = {"file_bytes": size} | ({"packed_bytes": size} if layout == "packed" else {})
    return found.model_copy(update={"bytes": found.bytes.model_copy(update=told)})


def estimate(
    source: Checkpoint,
    out: Path,
    *,
    weight_bytes: int,
    sidecar_bytes: int | None = None,
    threads: int | None = None,
    took: tuple[float, float] | None = None,
) -> Estimate:
    """What writing `source` to `out` takes. `took` are the seconds that deciding took here, and that it takes
    to count all tensors as often as the run does."""
    count = threads or cores()
    files = len({tensor.file for tensor in source.tensors})
    if sidecar_bytes is None:
        sidecar_bytes = sum(path.stat().st_size for path, _ in find_sidecars(source)[0])
    block = max(BLOCK_BYTES, *(tensor.nbytes // max(tensor.grid[0], 1) for tensor in source.tensors))
    working = count if count == 1 else max(count, min(files, count + WAITING))
    held = min(working * block, source.dense_bytes)
    memory = PROCESS_BYTES + _BLOCKS * held + _KEPT_BYTES * len(source.tensors)
    if source.is_torch:
        memory += _TORCH_BYTES
    seconds, rule = None, "not timed: nothing was read"
    if took is not None:
        hashing = (source.file_bytes + weight_bytes) * _hash_seconds()
        work = took[1] * min(count, len(source.tensors)) + hashing
        # A file is one thread's, the hashes of the source are one more's.
        seconds = took[0] + work / min(count, files + 1)
        rule = "time from this dry run's own reading and a probe of sha256, without that of the disk to write"
    return Estimate(
        disk_bytes=weight_bytes + sidecar_bytes + _TOLD_BYTES * (len(source.tensors) + 4),
        free_bytes=shutil.disk_usage(out.absolute().parent).free,
        memory_bytes=memory,
        seconds=seconds,
        rule=f"memory from the size of blocks and the number of threads; {rule}",
    )


def _hash_seconds() -> float:
    """Seconds per byte of sha256 on this machine."""
    probe = bytes(_PROBE_BYTES)
    began = perf_counter()
    hashlib.sha256(probe).digest()
    return (perf_counter() - began) / _PROBE_BYTES
