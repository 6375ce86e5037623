"""Torch files, only through torch's restricted loader: nothing in them is ever executed. Imports torch.

Which table of tensors is the model is found by looking, whatever its key: of the file itself and the tables
up to two keys down, the one with tensors of two dimensions or more that is no optimizer's state. What is not
a tensor is dropped. Names keep any `module.` prefix: training strips it, the writer keeps it.
"""

import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.header import MAX_DIMENSIONS, check_regular
from lpsparse.checkpoint.tensors import Blocks, Tensor, grid_of, lines_at_once
from lpsparse.errors import InputError, UsageError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
_STORAGE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_MAX_SHARED = 100  # times the file's size that its tensors may be: some names may share one storage
_LEVELS = 2  # how many keys down a table of tensors is looked for
_TOP = "."  # what the file itself is called, as such a table
_CONVERT = "convert the file to safetensors where you trust it"


@dataclass(frozen=True, slots=True)
class TorchFile:
    tensors: dict[str, tuple[str, Bits]]  # dtype, and raw bits in its own shape
    ties: dict[str, str]  # other names of these tensors, as safetensors' save_model writes them
    notes: tuple[str, ...]  # what was unwrapped or dropped


def open_torch_file(path: Path, key: str | None) -> tuple[list[Tensor], dict[str, str], tuple[str, ...]]:
    """Tensors, metadata and notes of a torch file: see `read_torch_file`."""
    found = read_torch_file(path, key)
    tensors = [_tensor(path, name, *item) for name, item in found.tensors.items()]
    return tensors, {"format": "pt", **found.ties}, found.notes


def _tensor(path: Path, name: str, dtype: str, raw: Bits) -> Tensor:
    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        if not raw.size:
            return
        lines, width = grid_of(raw.shape, dtype)
        step = lines_at_once(width, dtype)
        end = lines if last is None else last
        # A view with strides of its own is never copied as a whole.
        values = raw.reshape(-1) if raw.flags.c_contiguous else raw.flat
        for line in range(first, end, step):
            yield line, values[line * width : min(line + step, end) * width].reshape(-1, width)

    return Tensor(name, dtype, raw.shape, path.name, "dense", raw.nbytes, blocks)


def read_torch_file(path: Path, key: str | None = None) -> TorchFile:
    """What a torch file holds, under `key` if one is given. Names that share all of their bits are one
    tensor, of the first name.

    The bits are views of the file where it is a zip file (torch 1.6 on), which the system reads as they are
    used, else of what torch has read; strided as they were saved. Raises InputError when the restricted
    loader refuses the file (classes, functions, legacy tar files), when it declares more than it holds, and
    when there are no tensors, or several tables of them; UsageError for a `key` that none of these has.
    """
    size = check_regular(path)
    if size == 0:
        raise InputError(
            301, f"{path}: 0 bytes: the copy or download did not finish", hint="download it again"
        )
    table, notes = _unwrap(path, _load(path, size), key)
    values = {name: value for name, value in table.items() if isinstance(value, torch.Tensor)}
    tensors = {name: _raw(path, name, value) for name, value in values.items()}
    _refuse_more_than(path, size, list(values.values()))
    ties = _ties(values)
    notes += [f"{name!r} is tied to {first!r}: written once" for name, first in ties.items()]
    dropped = sorted(name for name, value in table.items() if not isinstance(value, torch.Tensor))
    if dropped:
        notes.append(f"dropped, not tensors: {', '.join(dropped)}")
    own = {name: item for name, item in tensors.items() if name not in ties}
    return TorchFile(own, ties, tuple(notes))


def _load(path: Path, size: int) -> Any:
    try:
        zipped = _refuse_bomb(path, size)
        with warnings.catch_warnings(action="ignore"):  # torch speaks of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (InputError, MemoryError):
        raise
    except pickle.UnpicklingError:
        with path.open("rb") as file:
            head = file.read(4)
        if head != b"PK\x03\x04" and not re.match(rb"\x80[\x01-\x05]", head):
            what = f"{path}: not a torch file"
            raise InputError(
                323, what, hint="give it the suffix of what it is, or download it again"
            ) from None
        # Torch's own text advises switching the guard off; it is never passed on.
        what = f"{path}: holds Python objects{_refused(path)}, which the restricted loader refuses"
        raise InputError(322, f"{what}; nothing was executed", hint=_CONVERT) from None
    except Exception as error:  # a broken file makes the loader stumble over anything
        what = f"{path}: not a torch file that can be read ({type(error).__name__})"
        raise InputError(323, what, hint="download or copy the file again") from None


def _refuse_bomb(path: Path, size: int) -> bool:
    """Refuse what would take memory before anybody could look at it: members that unpack to more than the
    file, and a pickle that makes bytes out of a number, which the restricted loader allows. Whether it is a
    zip file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        zipped = data[:4] == b"PK\x03\x04"  # as torch tells them
        if data.find(b"\nbytearray\n") >= 0:
            raise pickle.UnpicklingError
    if not zipped:
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    unpacked = sum(member.file_size for member in members)
    if unpacked > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        what = f"{path}: {size} bytes that unpack to {unpacked}; torch compresses nothing"
        raise InputError(321, what, hint=_CONVERT)
    return True


def _refused(path: Path) -> str:
    """Names of the classes and functions that are not allowed, where the file tells."""
    with suppress(Exception):  # it is not a zip file, or a broken one
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
    return ""


def _unwrap(path: Path, value: Any, key: str | None) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(value, Mapping):
        what = f"{path}: holds a {type(value).__name__}, not a table of tensors"
        raise InputError(320, what, hint="save a state dict")
    found = _choose(path, cast("Mapping[Any, Any]", value), key)
    table, notes = found.table, list[str]()
    if found.name != _TOP:
        others = f"; dropped beside it: {', '.join(sorted(found.beside))}" if found.beside else ""
        notes.append(f"tensors taken from '{found.name}'{others}")
    named = {str(name): item for name, item in table.items()}
    try:
        "".join(named).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no other file can hold
        what = f"{path}: a name in it is not text"
        raise InputError(320, what, hint="save a state dict with text for names") from None
    if len(named) < len(table):
        what = f"{path}: {len(table) - len(named)} names are equal when written as text"
        raise InputError(320, what, hint="save a state dict with text for names")
    return named, notes


@dataclass(frozen=True, slots=True)
class _Table:
    """A table that holds tensors, somewhere in a file."""

    name: str  # its keys, with a dot between them
    table: Mapping[Any, Any]
    beside: tuple[str, ...]  # what else there is, likewise

    def count(self, dimensions: int = 0) -> int:
        """How many tensors of so many dimensions or more it holds."""
        values = self.table.values()
        return sum(isinstance(each, torch.Tensor) and each.dim() >= dimensions for each in values)


def _choose(path: Path, value: Mapping[Any, Any], key: str | None) -> _Table:
    """The table of this key, else the only one of matrices, or where none has matrices of tensors."""
    tables = list(_tables(value))
    if not tables:
        top = ", ".join(sorted(map(str, value))[:8]) or "nothing"
        raise InputError(
            320, f"{path}: no tensors of a model found (top level: {top})", hint="save a state dict"
        )
    likely = [each for each in tables if each.count(2)] or tables
    found = likely if key is None else [each for each in tables if each.name == key]
    if len(found) == 1:
        return found[0]
    told = ", ".join(f"{each.name!r} ({each.count()} tensors)" for each in (found or tables)[:8])
    if key is not None and not found:
        what = f"--key {key}: {path} has no such table of tensors, but {told}"
        raise UsageError(261, what, hint="give one of these as --key")
    what = f"{path}: {len(found)} tables of tensors, and any may be the model: {told}"
    raise InputError(314, what, hint=f"choose one, such as --key {found[0].name}")


def _tables(
    value: Mapping[Any, Any], keys: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> Iterator[_Table]:
    if "param_groups" in value:  # the state of one of torch's optimizers
        return
    found = _Table(".".join(keys) or _TOP, value, beside)
    if found.count():
        yield found
    for key, item in value.items() if len(keys) < _LEVELS else ():
        if isinstance(item, Mapping) and "optim" not in str(key).lower():
            others = (".".join((*keys, str(other))) for other in value if other != key)
            yield from _tables(cast("Mapping[Any, Any]", item), (*keys, str(key)), (*beside, *others))


def _raw(path: Path, name: str, tensor: torch.Tensor) -> tuple[str, Bits]:
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if tensor.dtype not in NAMES or not plain or tensor.is_neg() or tensor.is_conj():
        kind = "without data" if tensor.is_meta else tensor.layout
        what = f"{path}: {name!r}: {tensor.dtype} {kind} cannot be written as safetensors"
        raise InputError(324, what, hint=_CONVERT)
    if tensor.dim() > MAX_DIMENSIONS:
        what = f"{path}: {name!r}: {tensor.dim()} dimensions, more than {MAX_DIMENSIONS}"
        raise InputError(324, what, hint=_CONVERT)
    held = tensor.untyped_storage().nbytes()
    if tensor.nbytes > held:
        what = f"{path}: {name!r}: declares {tensor.numel()} elements over a storage of {held} bytes"
        raise InputError(325, what, hint=_CONVERT)
    raw = tensor.detach().view(_STORAGE[tensor.element_size()]).numpy()
    return NAMES[tensor.dtype], raw.view(np.dtype(f"<u{tensor.element_size()}"))


def _ties(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Names of tensors that have all of their bits in common with one before, and its name."""
    first: dict[Any, str] = {}
    found = {
        name: first.setdefault((each.data_ptr(), each.dtype, each.shape, each.stride()), name)
        for name, each in tensors.items()
        if each.numel() and not (name.endswith("_orig") and name.removesuffix("_orig") + "_mask" in tensors)
    }
    return {name: other for name, other in found.items() if name != other}


def _refuse_more_than(path: Path, size: int, tensors: list[torch.Tensor]) -> None:
    """Raises InputError for storages that do not come out of the file, which torch makes of a bare number,
    and for so many names over few storages that writing them out would be a bomb."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    held = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    named = sum(tensor.nbytes for tensor in tensors)
    if held > size or named > _MAX_SHARED * size:
        what = f"{path}: {len(tensors)} names for {named} bytes over storages of {held}, in a file of {size}"
        raise InputError(325, what, hint=_CONVERT)
