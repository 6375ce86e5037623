"""What a checkpoint calls the tensors of a transformers module: the same, with or without a prefix, by a
legacy name, renamed, or as parts that transformers fuses.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lpsparse.borrowed import borrow
from lpsparse.checkpoint.names import LEGACY_NORMS
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError


@dataclass(frozen=True, slots=True)
class NameMap:
    """What the tensors of a module are called in its checkpoint."""

    sources: dict[str, str]  # name in the module -> key in the checkpoint
    fused: dict[str, str]  # key in the checkpoint -> the tensor of the module that holds it as a part
    own: dict[str, str]  # name in the module -> the key that a checkpoint of this very class has, if another


def match_names(checkpoint: Checkpoint, model: Any, state: dict[str, Tensor], missing: list[str]) -> NameMap:
    """Match a transformers module, made of `state`, with the keys of `state`; `missing` are names of a head
    that is fresh. Raises InputError for a parameter that could not be written back."""
    sources = _sources(model, set(state))
    fused, own = _trace(model, state, sources)
    if fused and missing:
        what = f"{checkpoint.name}: transformers fuses its tensors, and it has no head for the task yet"
        raise InputError(396, what, hint="add a head with transformers, save it, then use that")
    _refuse_untraced(checkpoint, model, {*sources, *missing, *fused.values()})
    return NameMap(sources, fused, own)


def _sources(model: nn.Module, source: set[str]) -> dict[str, str]:
    """Module name -> the checkpoint's key of it:
    the same, without or with the base model's prefix, or a legacy one."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    used: set[str] = set()
    for name in model.state_dict():
        near = [name, name.removeprefix(prefix), prefix + name]
        for new, old in LEGACY_NORMS.items():
            near += [key.removesuffix(new) + old for key in near[:3] if key.endswith(f"LayerNorm{new}")]
        key = next((key for key in near if key in source), None)
        if key is not None and key not in used:
            used.add(key)
            found[name] = key
    return found


def _trace(
    model: Any, state: dict[str, Tensor], sources: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Match the keys that no tensor of the module is named after. Add those that transformers renames to
    `sources`; return those that it fuses, key -> fused tensor, and the names that a checkpoint of this very
    class has for the renamed, module name -> key.

    transformers knows how to turn its names and tensors back; it is asked to do so for tensors that hold
    their own number. What does not come back bit for bit is left out.
    """
    own = model.state_dict()
    numbers = {i: name for i, name in enumerate(own) if name not in sources}
    left = set(state) - set(sources.values())
    if not numbers or not left:
        return {}, {}
    prefix = f"{model.base_model_prefix}."
    marks = {name: torch.tensor(float(i)).expand(own[name].shape) for i, name in numbers.items()}
    fused: dict[str, str] = {}
    called: dict[str, str] = {}
    for full, mark in turned_back(model, marks).items():
        key = full if full in left else full.removeprefix(prefix)  # a base model's have no prefix
        if key not in left or not mark.numel() or (mark != mark.flatten()[0]).any():
            continue
        name = numbers[int(mark.flatten()[0])]
        if mark.shape == own[name].shape and torch.equal(own[name], state[key].to(own[name].dtype)):
            sources[name], called[name] = key, full
        elif torch.equal(turned_back(model, {name: own[name]})[full], state[key].to(own[name].dtype)):
            fused[key] = name
    return fused, called


def turned_back(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a transformers module by the names and in the shapes that its checkpoints have."""
    turn_back = borrow("transformers.core_model_loading:revert_weight_conversion")
    if turn_back is not None:
        return turn_back(model, tensors)
    with TemporaryDirectory() as folder:
        copies = {name: value.clone() for name, value in tensors.items()}  # a file has no expanded ones
        model.save_pretrained(folder, state_dict=copies)
        files = sorted(Path(folder).glob("*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}


def _refuse_untraced(checkpoint: Checkpoint, model: nn.Module, known: set[str]) -> None:
    """A parameter that transformers made of tensors with other names
    (renamed, fused) would be trained and then lost: raises InputError."""
    names: dict[int, list[str]] = {}  # a tied parameter has several
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    lost = sorted(group[0] for group in names.values() if known.isdisjoint(group))
    if lost:
        what = (
            f"{checkpoint.name}: transformers renames or fuses {len(lost)} tensors ({', '.join(lost)[:160]})"
        )
        raise InputError(396, what, hint="save it with this version of transformers, then use that")
