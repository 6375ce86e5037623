"""Which tensors hold quantised values, or what scales them: cutting either by its magnitude means nothing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.writer import Named
from lpsparse.errors import InputError

_MAX_CONFIG_BYTES = 10_000_000
_UNSCALED = ("F64", "F32", "F16", "BF16")  # values that stand for themselves, whatever lies beside them
_SCALED = (  # ends of the names of stored values and of their scales, and what writes such a pair
    (".qweight", ".scales", "GPTQ or AWQ"),
    (".weight_packed", ".weight_scale", "compressed-tensors"),
    (".weight", ".weight_scale", "compressed-tensors"),
    (".weight", ".weight_scale_inv", "fp8 in scaled blocks"),
    (".weight", ".scale_weight", "scaled fp8"),
    (".weight", ".weight.absmax", "bitsandbytes"),
    (".weight", ".SCB", "bitsandbytes"),
    ("_blocks", "_scales", "MXFP4"),
)


def quantised(tensors: Iterable[Named]) -> dict[str, str]:
    """Name -> method of the tensors that hold quantised values or scales, told by names and dtypes."""
    dtypes = {name: dtype for name, dtype, _ in tensors}
    found: dict[str, str] = {}
    for name, dtype in dtypes.items():
        for values, scales, method in _SCALED:
            beside = name.removesuffix(values) + scales
            if name.endswith(values) and dtype not in _UNSCALED and beside in dtypes:
                found |= {name: method, beside: method}
    return found


def refuse_quantised(source: Checkpoint) -> None:
    """Raises InputError for a quantised checkpoint, by its tensors or its config.json. Float8 values without
    scales stand for themselves."""
    found = quantised((tensor.name, tensor.dtype, tensor.shape) for tensor in source.tensors)
    method = next(iter(found.values()), None)
    if any(tensor.dtype not in (*_UNSCALED, "I64", "BOOL") for tensor in source.tensors):
        method = _configured(source.root) or method  # of values that stand for themselves it says nothing
    if method is not None:
        names = [tensor.name for tensor in source.tensors if tensor.name in found]
        shown = f": {', '.join(names[:3])}" if names else ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = f"{source.name}: is quantised ({method}), which cannot be pruned or trained{shown}{more}"
        raise InputError(337, what, mend="take the model that it was quantised from, or dequantise it")


def _configured(folder: Path | None) -> str | None:
    """What config.json calls its quantisation, at its top or in a part such as text_config. A config that
    cannot be read says nothing: it is carried as it is."""
    path = folder / "config.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            config: Any = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    parts: list[Any] = [config, *config.values()] if isinstance(config, dict) else []
    for part in parts:
        settings: Any = part.get("quantization_config") if isinstance(part, dict) else None
        if settings:
            method: Any = settings.get("quant_method") if isinstance(settings, dict) else None
            return method if isinstance(method, str) and method else "by its config.json"
    return None
