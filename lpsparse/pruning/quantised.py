"""Which tensors hold quantised values, or what scales them: cutting either by its magnitude means nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lpsparse.checkpoint import rescue
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.entry import is_ours
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.weights import Named
from lpsparse.errors import InputError
from lpsparse.pruning.roles import is_buffer

_UNSCALED = ("F64", "F32", "F16", "BF16")  # values that stand for themselves, whatever lies beside them
_METHODS = (  # ends of the names of stored values and of their scales, and what writes such a pair
    (".qweight", ".wscales", "Nunchaku"),
    (".qweight", ".scales", "GPTQ or AWQ"),
    (".weight_packed", ".weight_scale", "compressed-tensors"),
    (".weight", ".weight_scale", "compressed-tensors"),
    (".weight", ".weight_scale_inv", "fp8 in scaled blocks"),
    (".weight", ".scale_weight", "scaled fp8"),
    (".weight", ".weight.absmax", "bitsandbytes"),
    (".weight", ".SCB", "bitsandbytes"),
    (".weight", ".scales", "MLX"),
    ("._data", "._scale", "quanto"),
    (".W_q", ".scale", "HQQ"),
    (".codes", ".codebooks", "AQLM"),
    ("_blocks", "_scales", "MXFP4"),
)
_INTEGERS = ("I8", "U8", "I16", "I32", "U32")  # wider ones are indexes
_ANY = "integers with scales"


def quantised(tensors: Iterable[Named]) -> dict[str, str]:
    """Name -> method of the tensors that hold quantised values, and of all floats beside them.

    An integer (or 8-bit) matrix with a float of the same prefix is quantised, whoever wrote it; a bias alone
    makes no scale. The pairs that are known give the method its name.
    """
    dtypes = {name: (dtype, shape) for name, dtype, shape in tensors}
    beside_integers: dict[str, list[str]] = {_prefix(name): [] for name in dtypes}
    scales: dict[str, list[str]] = {_prefix(name): [] for name in dtypes}
    for name, (dtype, _) in dtypes.items():
        if DTYPES[dtype].is_float and not name.endswith("bias"):
            beside_integers[_prefix(name)].append(name)
            if dtype in _UNSCALED and "scale" in name:
                scales[_prefix(name)].append(name)
    found: dict[str, str] = {}
    for name, (dtype, shape) in dtypes.items():
        if dtype in _UNSCALED:
            continue
        for values, ends, method in _METHODS:
            beside = name.removesuffix(values) + ends
            if name.endswith(values) and beside in dtypes:
                found |= {each: found.get(each, method) for each in (name, beside)}
        small = DTYPES[dtype].bits <= 8 if DTYPES[dtype].is_float else dtype in _INTEGERS
        prefix = _prefix(name)
        if small and prefix and sum(size > 1 for size in shape) > 1 and not is_buffer(name):
            floats = scales[prefix] if DTYPES[dtype].is_float else beside_integers[prefix]
            if floats:
                method = found.get(name, _ANY)
                found |= {each: method for each in (name, *floats)}
    return found


def _prefix(name: str) -> str:
    return name.rpartition(".")[0]


def refuse_quantised(source: Checkpoint) -> None:
    """Raises InputError for a quantised checkpoint, by its tensors or its config.json. Float8 values without
    scales stand for themselves, and so do values that are only sparse."""
    found = quantised((tensor.name, tensor.dtype, tensor.shape) for tensor in source.tensors)
    method = next(iter(found.values()), None)
    rescued = source.layout in rescue.LAYOUTS
    if rescued or any(tensor.dtype not in (*_UNSCALED, "I64", "BOOL") for tensor in source.tensors):
        method = (
            _configured(rescue.folder_of(source) if rescued else source.root) or method
        )  # of values that stand for themselves it says nothing
    if method is not None:
        names = [tensor.name for tensor in source.tensors if tensor.name in found]
        shown = f": {', '.join(names[:3])}" if names else ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = f"{source.name}: is quantised ({method}), which cannot be pruned or trained{shown}{more}"
        if rescued:
            what = f"{source.name}: is sparse and quantised ({method}), which cannot be unpacked{shown}{more}"
        raise InputError(337, what, hint="take the model that it was quantised from, or dequantise it")


def _configured(folder: Path | None) -> str | None:
    """What config.json calls its quantisation, at its top or in a part such as text_config."""
    config = rescue.config_of(folder)
    parts: list[Any] = [config, *config.values()]
    for settings in (part.get(key) for part in parts if isinstance(part, dict) for key in rescue.CONFIGS):
        if settings and not rescue.is_only_sparse(settings) and not is_ours(settings):
            method: Any = settings.get("quant_method") if isinstance(settings, dict) else None
            return method if isinstance(method, str) and method else "by its config.json"
    return None
