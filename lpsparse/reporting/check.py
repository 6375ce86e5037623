"""Does a folder still hold what its manifest says? Read from the files alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.manifest import TensorRecord, digest, list_files, read_manifest
from lpsparse.checkpoint.opening import open_checkpoint
from lpsparse.checkpoint.rewrite import count_all
from lpsparse.checkpoint.threads import parallel
from lpsparse.errors import InputError


def check_folder(folder: Path) -> dict[str, Any]:
    """Files, hashes, zero counts and finiteness: {"ok", "files", "tensors", "problems"}.

    Raises InputError when `folder` has no manifest that can be read.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    listed = {record.name: record for record in manifest.files}
    present = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    problems += [f"{name}: missing" for name in sorted(set(listed) - set(present))]
    extra = [name for name in set(present) - set(listed) if name[0] != "."]  # .git, .cache: a download's own
    problems += [f"{name}: not in the manifest" for name in sorted(extra)]
    both = sorted(set(listed) & set(present))
    for name, found in zip(both, parallel(lambda name: digest(present[name], folder), both), strict=True):
        if found != listed[name]:
            problems.append(f"{name}: {found.size} bytes, sha256 {found.sha256[:12]}, the manifest has "
                            f"{listed[name].size} bytes, {listed[name].sha256[:12]}")  # fmt: skip
    problems += _tensor_problems(folder, manifest.tensors)
    return {"ok": not problems, "files": len(listed), "tensors": len(manifest.tensors), "problems": problems}


def _tensor_problems(folder: Path, records: tuple[TensorRecord, ...]) -> Iterator[str]:
    try:
        checkpoint = open_checkpoint(folder)
        found = count_all(checkpoint)
        counts = {tensor.name: (tensor, found[tensor.name]) for tensor in checkpoint.tensors}
    except InputError as error:
        yield error.what
        return
    for record in records:
        tensor, counted = counts.pop(record.name, (None, None))
        if tensor is None or counted is None:
            yield f"{record.name}: tensor missing"
        elif (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            yield f"{record.name}: {tensor.dtype} {tensor.shape}, expected {record.dtype} {record.shape}"
        elif counted.zeros != record.zeros:
            yield f"{record.name}: {counted.zeros} zeros, the manifest has {record.zeros}"
        elif counted.nonfinite and record.finite:
            yield f"{record.name}: {counted.nonfinite} values are NaN or Inf"
    yield from (f"{name}: tensor not in the manifest" for name in counts)
