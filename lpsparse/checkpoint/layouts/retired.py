"""Sparse checkpoints of compressed-tensors 0.3 to 0.14, which nothing else opens any more, as plain tensors.

What it wrote, by its sources, into model.safetensors or shards, of which two may share the parts of a weight:
  sparse-bitmask     the four parts of layouts/bitmask.py; of N dimensions the mask is (..., ceil(last / 8)),
                     and row_offsets (...) are sums along the first one, which only two dimensions can use
  sparse-24-bitmask  `compressed` is (rows, columns / 2), `shape` (2, 1), and there are no row_offsets
The parts of M.weight are M.compressed and so on. Until 0.8 every tensor was packed, a bias and a counter too,
and those of W were W.compressed. config.json tells of it in `quantization_config`, before that in
`compression_config`, and at first at its top.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.files import fsync
from lpsparse.checkpoint.header import Entry, json_table
from lpsparse.checkpoint.layouts import bitmask
from lpsparse.checkpoint.layouts.base import RetiredLayout
from lpsparse.checkpoint.tensors import BLOCK_BYTES, Blocks, Checkpoint, Tensor, grid_of
from lpsparse.errors import InputError
from lpsparse.families import RETIRED_LAYOUTS

_OPENS = "lpsparse (load, unpack); compressed-tensors until 0.14, which wrote it"
BY_ROWS = RetiredLayout("sparse-bitmask", _OPENS)
TWO_OF_FOUR = RetiredLayout("sparse-24-bitmask", _OPENS)
CONFIGS = ("quantization_config", "compression_config")  # where config.json says how weights are stored
_AGAIN = "download the checkpoint again"

Parts = dict[str, Tensor]
Refuse = Callable[[str], InputError]


def rescued(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the weights that compressed-tensors packed in the place of their parts; itself where
    there are none. Raises InputError where parts are missing or disagree, before any value is read."""
    if checkpoint.layout != "dense":
        return checkpoint
    given = {tensor.name: tensor for tensor in checkpoint.tensors}
    found = find_packed(given, lambda: _says_sparse(config_of(folder_of(checkpoint))))
    if not found:
        return checkpoint
    whole = any(prefix.endswith(".weight") for prefix in found)  # as until 0.8
    at: dict[str, Tensor] = {}
    for prefix, parts in found.items():
        name = prefix if whole else f"{prefix}.weight"
        if name in given:
            what = f"{checkpoint.name}: {name!r} is stored twice, packed and dense"
            raise InputError(340, what, hint=_AGAIN)
        at[f"{prefix}.compressed"] = _open_packed(
            checkpoint.name, name, {part: given[f"{prefix}.{part}"] for part in parts}
        )
    gone = {f"{prefix}.{part}" for prefix, parts in found.items() for part in parts}
    tensors = tuple(at.get(name, tensor) for name, tensor in given.items() if name in at or name not in gone)
    layout = next((tensor.layout for tensor in at.values() if tensor.layout in RETIRED_LAYOUTS), BY_ROWS.name)
    metadata = {file: {**said, "lpsparse.layout": layout} for file, said in checkpoint.metadata.items()}
    note = f"{len(at)} tensors are unpacked from {layout}, a retired layout of compressed-tensors"
    return replace(checkpoint, tensors=tensors, metadata=metadata, notes=(*checkpoint.notes, note))


def find_packed(names: Iterable[str], is_said: Callable[[], bool] = lambda: False) -> dict[str, set[str]]:
    """Prefix -> its parts among `names`. Values with a mask are believed to be a packed weight; where
    config.json says that there are some (`is_said`, asked once), either is."""
    found: dict[str, set[str]] = {}
    for name in names:
        prefix, dot, part = name.rpartition(".")
        if dot and part in bitmask.PARTS:
            found.setdefault(prefix, set()).add(part)
    least = 1 if found and is_said() else 2
    return {
        prefix: parts for prefix, parts in found.items() if len(parts & {"compressed", "bitmask"}) >= least
    }


def _open_packed(model: str, name: str, parts: Parts) -> Tensor:
    """The weight, when all that its parts say of sizes was checked. Raises InputError."""
    where = f"{model}/{min(part.file for part in parts.values())}: {name!r}"

    def refuse(why: str) -> InputError:
        return InputError(340, f"{where}: {why}", hint=_AGAIN)

    by_rows = "row_offsets" in parts or ("compressed" in parts and len(parts["compressed"].shape) < 2)
    missing = [part for part in bitmask.PARTS[: 4 if by_rows else 3] if part not in parts]
    if missing:
        raise refuse(f"its {', '.join(missing)} is missing")
    shape = _shape(parts, refuse)
    values, layout = parts["compressed"], (BY_ROWS if by_rows else TWO_OF_FOUR).name

    def read(part: str, first: int, count: int) -> Bits:
        return _units(parts[part], first, count)

    if by_rows and len(shape) == 2 and DTYPES[values.dtype].is_float:
        entries = {part: Entry(t.name, t.dtype, t.shape, 0, t.nbytes) for part, t in parts.items()}
        return bitmask.bitmask_tensor(name, values.file, bitmask.check(where, entries, read, _AGAIN), layout)
    stored_bytes = sum(part.nbytes for part in parts.values())
    if not by_rows and values.size and shape[1] % 4 == 0:  # each row has as many values
        ends = np.arange(shape[0] + 1, dtype=np.uint64) * np.uint64(shape[1] // 2)
        packed = bitmask.Packed(where, values.dtype, shape, shape[1], stored_bytes, ends, read, _AGAIN)
        return bitmask.bitmask_tensor(name, values.file, packed, layout)
    blocks = _in_order(values, parts["bitmask"], shape, refuse)
    layout = layout if math.prod(shape) else "dense"  # nothing to decode
    return Tensor(name, values.dtype, shape, values.file, layout, stored_bytes, blocks)


def _shape(parts: Parts, refuse: Refuse) -> tuple[int, ...]:
    """The weight's, when every part has the one that follows from it."""
    values, mask, size = (parts[part] for part in ("compressed", "bitmask", "shape"))
    if size.size > 16 or size.shape not in ((size.size,), (size.size, 1)):
        raise refuse(f"its shape part is {size.dtype} {size.shape}, not int64 of 0 to 16 dimensions")
    if size.dtype != "I64" and size.size:  # of no dimension torch made it a float
        raise refuse(f"its shape part is {size.dtype}, not int64")
    shape = tuple(int(n) for n in _units(size, 0, size.size)) if size.size else ()
    if math.prod(max(n, 1) for n in shape) >= 2**60:
        raise refuse(f"shape {shape} has more than 2**60 values")
    lines, last = shape[:-1], shape[-1] if shape else 1
    if mask.dtype != "U8" or mask.shape != (*lines, -(-last // 8)):
        raise refuse(f"bitmask is {mask.dtype} {mask.shape}, shape {shape} needs {(*lines, -(-last // 8))}")
    if DTYPES[values.dtype].bits < 8:
        raise refuse(f"values of {values.dtype} cannot be packed")
    offsets = parts.get("row_offsets")
    if offsets is None:
        if len(shape) != 2 or math.prod(shape) % 4 or (*values.shape[:1], 2 * values.shape[1]) != shape:
            raise refuse(f"compressed is {values.shape}, which is not two of each four of shape {shape}")
    elif offsets.dtype != "I64" or offsets.shape != lines or len(values.shape) != 1:
        raise refuse("row_offsets or compressed have the wrong form")
    if values.size > math.prod(shape):
        raise refuse(f"{values.size} values for shape {shape}")
    return shape


def _units(tensor: Tensor, first: int, count: int) -> Bits:
    """`count` storage units from unit `first` on."""
    if count == 0:
        return np.empty(0, DTYPES[tensor.dtype].storage)
    _, width = tensor.grid
    line, last = first // width, -(-(first + count) // width)
    read = np.concatenate([block.reshape(-1) for _, block in tensor.blocks(line, last)])
    return read[first - line * width :][:count]


def _in_order(values: Tensor, mask: Tensor, shape: tuple[int, ...], refuse: Refuse) -> Callable[..., Blocks]:
    """Blocks of a weight that does not say where its rows begin: what comes before is counted in the mask."""
    rows, storage = (shape[0] if shape else 1), DTYPES[values.dtype].storage
    flat = len(shape) < 2  # a row is one value, and eight of them are a byte of the mask

    def bits_of(row: int, upto: int) -> NDArray[np.bool]:
        if flat:
            found = _units(mask, row // 8, -(-upto // 8) - row // 8).reshape(1, -1)
            return np.unpackbits(found, axis=1, count=upto - row, bitorder="little").view(bool).reshape(-1, 1)
        width = mask.size // rows
        found = _units(mask, row * width, (upto - row) * width).reshape(-1, mask.shape[-1])
        bits = np.unpackbits(found, axis=1, count=shape[-1], bitorder="little").view(bool)
        return bits.reshape(upto - row, -1)

    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        lines, width = grid_of(shape, values.dtype)
        end = lines if last is None else last
        if not math.prod(shape):
            return
        pieces, begin = lines // rows, 0
        step = max(1, BLOCK_BYTES // (width * pieces * storage.itemsize))
        step = -(-step // 8) * 8 if flat else step
        for row in range(0, -(-end // pieces), step):
            bits = bits_of(row, min(row + step, -(-end // pieces)))
            count = int(np.count_nonzero(bits))
            if begin + count > values.size:
                raise refuse(f"bitmask counts more than its {values.size} values")
            line = row * pieces
            if line + bits.shape[0] * pieces > first:
                block = np.zeros(bits.shape, storage)
                block[bits] = _units(values, begin, count)
                skip = max(first - line, 0)
                yield line + skip, block.reshape(-1, width)[skip : end - line]
            begin += count
        if end == lines and begin != values.size:
            raise refuse(f"bitmask counts {begin} of its {values.size} values")

    return blocks


def folder_of(checkpoint: Checkpoint) -> Path | None:
    """The folder of its config.json, also for a single file."""
    return checkpoint.root or next((path.parent for path in checkpoint.files), None)


def config_of(folder: Path | None) -> dict[str, Any]:
    """The content of config.json; empty if it cannot be read (it is copied as it is)."""
    return {} if folder is None else json_table(folder / "config.json")


def _says_sparse(config: dict[str, Any]) -> bool:
    holders = [config, *(config.get(key) for key in CONFIGS)]
    said: list[Any] = [each.get("sparsity_config") for each in holders if isinstance(each, dict)]
    return any(isinstance(each, dict) and each.get("format") in RETIRED_LAYOUTS for each in said)


def is_only_sparse(settings: Any) -> bool:
    """Whether a `quantization_config` of compressed-tensors tells of zeros alone: of no groups and of no
    scheme of the cache, by which transformers goes, too."""
    return (
        isinstance(settings, dict)
        and isinstance(settings.get("sparsity_config"), dict)
        and settings.get("quant_method", "compressed-tensors") == "compressed-tensors"
        and settings.get("format") in (None, "dense", *RETIRED_LAYOUTS)
        and not settings.get("config_groups")
        and not settings.get("kv_cache_scheme")
    )


def free_config(folder: Path) -> tuple[str, ...]:
    """Take out of the config.json in OUT what it said of the retired layout, and leave its other bytes.
    A note of it."""
    path = folder / "config.json"
    unwanted = [key for key in (*CONFIGS, "sparsity_config") if key in config_of(folder)]
    if not unwanted:
        return ()
    text = path.read_bytes()
    encoding = json.detect_encoding(text)
    path.write_bytes(_without(text.decode(encoding), unwanted).encode(encoding))
    fsync(path)
    return (f"removed from config.json: {', '.join(unwanted)} (settings of the retired layout)",)


def _without(text: str, unwanted: list[str]) -> str:
    """The text of a JSON object without some of its members, the others as they were."""
    decoder, kept = json.JSONDecoder(), list[str]()
    begin = at = text.index("{") + 1
    while True:
        start = at
        key, at = decoder.raw_decode(text, _past_space(text, at))
        _, end = decoder.raw_decode(text, _past_space(text, _past_space(text, at) + 1))
        at = _past_space(text, end)
        kept += [text[start:end]] if key not in unwanted else []
        if text[at] == "}":
            return text[:begin] + ",".join(kept) + text[end:]
        at += 1


def _past_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
