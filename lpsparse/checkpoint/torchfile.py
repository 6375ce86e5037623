"""Torch files, only through torch's restricted loader: nothing in them is ever executed. Imports torch.

The unwrapping rules, applied in this order and reported: the tensors are looked for under `state_dict`, then
under `model`; what is not a tensor is dropped. Names keep any `module.` prefix: training strips it, the
writer keeps it.
"""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.header import check_regular
from lpsparse.errors import InputError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STORAGE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_MAX_ZIP_RATIO = 100  # torch stores members uncompressed; more is a bomb
_CONVERT = "convert the file to safetensors where you trust it"


def read_torch_file(path: Path) -> tuple[dict[str, tuple[str, Bits]], tuple[str, ...]]:
    """Each tensor as (dtype, raw bits in its own shape), and what was unwrapped or dropped.

    Raises InputError when the restricted loader refuses the file (classes, functions, legacy tar files),
    when a tensor declares more elements than its storage holds, and when there are no tensors.
    """
    if check_regular(path) == 0:
        raise InputError(
            301, f"{path}: 0 bytes: the copy or download did not finish", mend="download it again"
        )
    table, notes = _unwrap(path, _load(path))
    tensors = {
        name: _raw(path, name, value) for name, value in table.items() if isinstance(value, torch.Tensor)
    }
    dropped = sorted(name for name, value in table.items() if not isinstance(value, torch.Tensor))
    if dropped:
        notes.append(f"dropped, not tensors: {', '.join(dropped)}")
    if not tensors:
        found = ", ".join(sorted(map(str, table))[:8]) or "nothing"
        raise InputError(320, f"{path}: no tensors found (top level: {found})", mend="save a state dict")
    return tensors, tuple(notes)


def _load(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            _refuse_bomb(path)
        with warnings.catch_warnings(action="ignore"):  # torch speaks of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, MemoryError):
        raise
    except pickle.UnpicklingError:
        # Torch's own text advises switching the guard off; it is never passed on.
        what = f"{path}: holds Python objects that the restricted loader refuses; nothing was executed"
        raise InputError(322, what, mend=_CONVERT) from None
    except Exception as error:  # a broken file makes the loader stumble over anything
        what = f"{path}: not a torch file that can be read ({type(error).__name__})"
        raise InputError(323, what, mend="download or copy the file again") from None


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > _MAX_ZIP_RATIO * max(member.compress_size, 1):
                what = (
                    f"{path}: {member.filename!r} unpacks {member.compress_size} to {member.file_size} bytes"
                )
                raise InputError(321, what, mend=_CONVERT)


def _unwrap(path: Path, value: Any) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            others = sorted(str(name) for name in value if name != key)
            notes.append(
                f"tensors taken from '{key}'"
                + (f"; dropped beside it: {', '.join(others)}" if others else "")
            )
            value = value[key]
    if not isinstance(value, Mapping):
        what = f"{path}: holds a {type(value).__name__}, not a table of tensors"
        raise InputError(320, what, mend="save a state dict")
    table = cast("Mapping[Any, Any]", value)
    named = {str(name): item for name, item in table.items()}
    if len(named) < len(table):
        what = f"{path}: {len(table) - len(named)} names stand twice when written as text"
        raise InputError(320, what, mend="save a state dict with text for names")
    return named, notes


def _raw(path: Path, name: str, tensor: torch.Tensor) -> tuple[str, Bits]:
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if tensor.dtype not in _NAMES or not plain:
        kind = "without data" if tensor.is_meta else tensor.layout
        what = f"{path}: {name!r}: {tensor.dtype} {kind} cannot be written as safetensors"
        raise InputError(324, what, mend=_CONVERT)
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        what = f"{path}: {name!r}: declares {tensor.numel()} elements over a storage of {held} bytes"
        raise InputError(325, what, mend=_CONVERT)
    flat = tensor.detach().contiguous().view(-1).view(_STORAGE[tensor.element_size()])
    storage = np.dtype(f"<u{tensor.element_size()}")
    return _NAMES[tensor.dtype], flat.numpy().view(storage).reshape(tuple(tensor.shape))
