"""State dicts saved while torch.nn.utils.prune is on: NAME_orig and NAME_mask are one tensor, NAME."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from lpsparse.checkpoint.dtypes import Bits
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.errors import InputError

_ONE = {"F64": 0x3FF0000000000000, "F32": 0x3F800000, "F16": 0x3C00, "BF16": 0x3F80}


def baked(tensors: Iterable[Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
    """The tensors, with each masked weight as torch's `prune.remove` leaves it; and a note where there are
    such. A mask must be of the shape and dtype of its weight."""
    given = {tensor.name: tensor for tensor in tensors}
    pairs = {name: name.removesuffix("_orig") + "_mask" for name in given if name.endswith("_orig")}
    pairs = {
        name: mask
        for name, mask in pairs.items()
        if _is_mask(given.get(mask), given[name]) and name.removesuffix("_orig") not in given
    }
    masks = set(pairs.values())
    found = [
        _baked(tensor, given[pairs[name]]) if name in pairs else tensor
        for name, tensor in given.items()
        if name not in masks
    ]
    note = f"masks of torch.nn.utils.prune are applied to {len(pairs)} weights: {', '.join(list(pairs)[:3])}"
    return found, (note,) if pairs else ()


def _is_mask(mask: Tensor | None, of: Tensor) -> bool:
    return mask is not None and (mask.shape, mask.dtype) == (of.shape, of.dtype) and of.dtype in _ONE


def _baked(tensor: Tensor, mask: Tensor) -> Tensor:
    def blocks(first: int = 0, last: int | None = None) -> Blocks:
        for (line, values), (_, kept) in zip(
            tensor.blocks(first, last), mask.blocks(first, last), strict=True
        ):
            yield line, np.where(_checked(kept, mask) != 0, values, np.zeros_like(values))

    return replace(tensor, name=tensor.name.removesuffix("_orig"), blocks=blocks)


def _checked(kept: Bits, mask: Tensor) -> Bits:
    if not np.isin(kept, (0, _ONE[mask.dtype])).all():
        what = f"{mask.file}: {mask.name!r}: a mask with other values than 0 and 1"
        raise InputError(359, what, hint="call prune.remove(module, name) before you save")
    return kept
