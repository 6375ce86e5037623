"""Refuse what other programs leave where a checkpoint is expected, with the command that makes one of it;
apply the masks of torch.nn.utils.prune."""

import os
import re
import zipfile
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from lpsparse.checkpoint.dtypes import DTYPES, Bits
from lpsparse.checkpoint.header import check_regular, json_table
from lpsparse.checkpoint.names import components_in, is_pipeline
from lpsparse.checkpoint.tensors import Blocks, Tensor
from lpsparse.errors import InputError

_OPTIMIZER_PART = "_optim_states.pt"  # of DeepSpeed's ZeRO: one for each process
_PART = ".distcp"  # of torch.distributed.checkpoint
_ONE = {"F64": 0x3FF0000000000000, "F32": 0x3F800000, "F16": 0x3C00, "BF16": 0x3F80}


def refuse_archive(path: Path) -> None:
    """Raises InputError for a part of a distributed checkpoint, and for an archive of torch that holds a
    program."""
    if path.name.endswith((_OPTIMIZER_PART, _PART)):
        refuse_parts(path.parent, [path.name], within=False)
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # it is no archive, or is refused as a broken one
    if "constants.pkl" in members or any(name.startswith("code/__torch__") for name in members):
        kind, state = (
            "a TorchScript program",
            f'torch.jit.load("{path.name}", map_location="cpu").state_dict()',
        )
    elif "archive_format" in members or "serialized_exported_program.json" in members:
        kind, state = "a program of torch.export", f'torch.export.load("{path.name}").state_dict'
    else:
        return
    hint = f'where you trust it, in Python: import torch; torch.save({state}, "weights.pt"); then take that'
    raise InputError(317, f"{path}: {kind}, not a state dict", hint=hint)


def refuse_whole(folder: Path, names: Collection[str], weights: Collection[str]) -> None:
    """Raises InputError for a folder that is not a model but an adapter of one, a pipeline of several, or the
    hub's cache around one."""
    if "adapter_config.json" in names and not weights:
        _refuse_adapter(folder, folder)
    if is_pipeline(names):
        of = components_in(folder)
        what = f"{folder}: a diffusers pipeline, of {', '.join(of) or 'no component with weights'}"
        some = of[0] if of else "unet"
        hint = f"give one component: {folder / some}; `prune` takes all of it, with --component {some}"
        raise InputError(319, what, hint=hint)
    snapshots = sorted((folder / "snapshots").glob("*")) if {"snapshots", "blobs"} <= set(names) else []
    if snapshots:
        what = f"{folder}: a repository in the hub's cache, not a model folder"
        raise InputError(339, what, hint=f"give one of its snapshots: {snapshots[-1]}")


def refuse_adapter(file: Path) -> None:
    """Raises InputError for the weights of an adapter, given by their own name."""
    if file.name in ("adapter_model.safetensors", "adapter_model.bin"):
        _refuse_adapter(file, file.parent)


def _refuse_adapter(given: Path, folder: Path) -> None:
    base = json_table(folder / "adapter_config.json").get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else "another model"
    merge = f'AutoPeftModel.from_pretrained("{folder}").merge_and_unload().save_pretrained("merged")'
    hint = f"merge it first, with peft: {merge}"
    raise InputError(318, f"{given}: an adapter of {base}, not a model", hint=hint)


def refuse_parts(folder: Path, names: Collection[str], *, within: bool) -> None:
    """Raises InputError where the names in a folder, or in the folders `within` it, are those of a checkpoint
    that each process of a training wrote its part of."""
    places = {folder: list(names)}
    for path in sorted(folder / name for name in names) if within else ():
        with suppress(OSError):  # a file, or closed to us
            places[path] = os.listdir(path)
    for place, inside in places.items():
        parts = [name for name in inside if name.endswith(_PART)]
        if parts:
            what = f"{place}: a torch.distributed checkpoint in {len(parts)} parts ({_PART}), not gathered"
            gather = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} weights.pt"
            raise InputError(316, what, hint=f"`{gather}`, then take weights.pt")
        parts = [name for name in inside if name.endswith(_OPTIMIZER_PART)]
        if parts:
            what = f"{place}: a DeepSpeed checkpoint in {len(parts)} parts (*{_OPTIMIZER_PART}), not gathered"
            tag = f" -t {place.resolve().name}" if place == folder else ""
            top = place.parent if place.name else Path("..")
            hint = f"`python {top / 'zero_to_fp32.py'} {top} gathered{tag}`, then take the folder gathered"
            raise InputError(316, what, hint=hint)


def refuse_hollow(name: str, tensors: Iterable[Tensor]) -> None:
    """Raises InputError where parameters have the shape [0], which no layer gives them: ZeRO-3 leaves that in
    each process's model while the values are with all of them. Other tensors may hold nothing, unless one of
    the same name in another layer holds something. Older releases left [1], which a few layers have, but
    hardly two in a model without a matrix."""
    given = list(tensors)
    floats = [each for each in given if DTYPES[each.dtype].is_float]
    empty = [each for each in floats if each.shape == (0,)]
    full = {_in_any_layer(each.name) for each in given if each.size} if empty else set[str]()
    hollow = [each for each in empty if each.name.endswith(".weight") or _in_any_layer(each.name) in full]
    if not hollow and all(len(each.shape) <= 1 for each in floats):
        single = [each for each in floats if each.shape == (1,)]
        hollow = single if sum(each.name.endswith(".weight") for each in single) > 1 else []
    if hollow:
        what = (
            f"{name}: {len(hollow)} of {len(given)} tensors have the shape {list(hollow[0].shape)}, such as "
        )
        what += f"{hollow[0].name!r}: saved under DeepSpeed ZeRO-3 before they were gathered"
        hint = "gather the checkpoint: `python CHECKPOINT/zero_to_fp32.py CHECKPOINT OUT`, and take OUT"
        raise InputError(315, what, hint=hint)


def _in_any_layer(name: str) -> str:
    return re.sub(r"\d+", "0", name)


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
