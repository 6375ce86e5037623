"""Decide what a run does: its autos, what is refused, which weights may be cut, and all that in words."""

import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lpsparse.errors import InputError, UsageError
from lpsparse.families import METHODS, SCORES
from lpsparse.parallel import ranks
from lpsparse.parallel.progress import Brief
from lpsparse.pruning.targets import Chosen, check_chosen, decide, no_match
from lpsparse.steps.base import about
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.control import SparsityControl
from lpsparse.training.model import Loaded
from lpsparse.training.modules import roles_of
from lpsparse.training.schedule import plan_phases
from lpsparse.training.scores import SETTLED

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def resolve_auto(step: FinetuneStep, model: nn.Module, steps: int) -> FinetuneStep:
    """Return `step` with each auto replaced by what was best on models of this kind (docs/method.md), for a
    run of `steps` optimizer steps. Raises UsageError for a score that would mean nothing."""
    method = METHODS[step.method]
    batch_norm = any(isinstance(part, BATCH_NORMS) for part in model.modules())
    target = step.target_sparsity is not None
    settled = not target or round(step.decay_share * steps) >= 2 * SETTLED
    if step.score != "auto" and SCORES[step.score].settles and not settled:
        early = f"within {2 * SETTLED} steps, before gradients have an average"
        what = f"--score {step.score}: the cut comes {early}"
        raise UsageError(214, what, hint="train longer, or use --score magnitude")
    fisher = method.selects and step.optimizer == "adamw" and settled and not batch_norm
    # A held norm gives back what decay takes from the weights that stay; selective decay takes nothing.
    rows = method.selects and not (target and step.selective) and not batch_norm
    auto = {
        "score": "fisher" if fisher else "magnitude",
        "condition": "rows" if rows else "none",
        "cut": "gradual" if method.selects and target and batch_norm else "end",
    }
    return step.model_copy(update={key: best for key, best in auto.items() if getattr(step, key) == "auto"})


def warning_of(step: FinetuneStep, steps: int) -> str | None:
    """What to say, before it starts, of a run whose steps are too few for its phases; None where they do."""
    least = math.ceil(2 * SETTLED / step.decay_share)
    if step.target_sparsity is None or METHODS[step.method].cuts == "start" or steps >= least:
        return None
    cut_at = plan_phases(step, steps).cut_at
    what = f"{steps} steps are few: the cut comes after {cut_at}, when gradients have no average yet"
    return f"{what}; give --steps {least} or more"


def check_shard(step: FinetuneStep) -> None:
    """Raises UsageError for what needs whole tensors, or other processes."""
    if ranks.world_size() == 1:
        raise UsageError(232, "--shard: there is only one process", hint="add --processes 2 or more")
    whole = {
        "--condition": step.condition != "none" and step.condition,
        "--method": not METHODS[step.method].shards and step.method,
        "--optimizer": step.optimizer == "muon" and step.optimizer,
        "--mixed-precision": step.mixed_precision == "fp16" and step.mixed_precision,
        "--allocation": step.allocation != "global" and step.allocation,
    }
    for name, value in whole.items():
        if value:
            what = f"{name} {value} needs whole tensors, which --shard splits"
            raise UsageError(233, what, hint=f"leave --shard out, or choose another {name}")


def freeze_(step: FinetuneStep, loaded: Loaded) -> None:
    """Freeze the parameters that --freeze names, by their names in OUT. What is frozen already stays so.

    Raises UsageError for a pattern that matches nothing.
    """
    outs = [name for name, _, _ in _described(loaded)]
    for pattern in step.freeze:
        if not any(fnmatchcase(out, pattern) for out in outs):
            raise no_match("--freeze", pattern, outs)
    for _, files, param in _parameters(loaded):
        if _is_named(step.freeze, files):
            param.requires_grad_(False)


def prunable_parameters(
    step: FinetuneStep, loaded: Loaded, *, resumes: bool = False, held: set[int] | None = None
) -> tuple[Chosen, dict[str, torch.Tensor]]:
    """Return which tensors of OUT may be cut, and why not; and the parameters that are cut and trained here,
    by their name in OUT. `held` are the ids of the optimizer's parameters, where there is one.

    Raises UsageError where nothing is left to train or to cut, InputError for a weight of zeros alone that
    the method would hold there (not where the run `resumes`, since a cut may have emptied a tensor).
    """
    prunable = _decided(step, loaded)
    weights: dict[str, torch.Tensor] = {}
    left: dict[str, str] = {}  # name in OUT -> why it is not cut here, although it might be
    first: dict[int, str] = {}
    for out, files, param in _parameters(loaded):
        tied_to = first.setdefault(id(param), out)
        why = f"tied to {tied_to}" if tied_to != out else _why_left(step, files, param, held)
        left |= dict.fromkeys(files, why) if why else {}
        if tied_to == out and _is_prunable(prunable, files) and left.keys().isdisjoint(files):
            weights[out] = param
    _check_some(step, loaded, weights, resumes=resumes)
    parts = loaded.parts()
    kept = {each for out in weights for each in parts.get(out, [out])}
    rest = {out: each for out, each in prunable.items() if each.prunable and out not in kept}
    rest = {out: replace(each, prunable=False, reason=left.get(out, "buffer")) for out, each in rest.items()}
    return prunable | rest, weights


def _decided(step: FinetuneStep, loaded: Loaded) -> Chosen:
    """Which tensors of OUT are prunable by their roles and the step's patterns."""
    names = loaded.names
    config: Any = getattr(loaded.module, "config", None)
    told = {names[name]: role for name, role in roles_of(loaded.module).items() if name in names}
    config = config.to_dict() if callable(getattr(config, "to_dict", None)) else None  # transformers' own
    by = type(loaded.module).__name__
    prunable = decide(_described(loaded), step.include, step.exclude, config, told, by)
    check_chosen(prunable, step.include, step.exclude)
    return prunable


def _described(loaded: Loaded) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name in OUT, dtype, shape) of each tensor; the parts of a fused one stand for it."""
    state, parts = loaded.module.state_dict(), loaded.parts()
    plain = [(out, state[name]) for name, out in loaded.names.items() if out not in parts]
    found = [(out, _dtype_name(value), tuple(value.shape)) for out, value in plain]
    return found + [(out, _dtype_name(state[name]), shape) for out, (name, shape) in loaded.fused.items()]


def _parameters(loaded: Loaded) -> Iterator[tuple[str, list[str], nn.Parameter]]:
    """(name in OUT, names of its parts or its own, parameter); a tied one comes under each of its names."""
    parts = loaded.parts()
    for name, param in loaded.module.named_parameters(remove_duplicate=False):
        out = loaded.names.get(name, name)
        yield out, parts.get(out, [out]), param


def _why_left(step: FinetuneStep, files: list[str], param: nn.Parameter, held: set[int] | None) -> str:
    """Why a parameter does not take part in the training; empty where it does."""
    if _is_named(step.freeze, files):
        return "--freeze"
    if not param.requires_grad:
        return "frozen"
    return "not in the optimizer" if held is not None and id(param) not in held else ""


def _is_named(patterns: tuple[str, ...], names: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _is_prunable(prunable: Chosen, files: list[str]) -> bool:
    chosen = {each in prunable and prunable[each].prunable for each in files}
    if len(chosen) > 1:
        what = f"--include or --exclude takes only a part of what transformers fuses: {files[0]}, ..."
        raise UsageError(213, what, hint=f"take all {len(files)} of them, or none")
    return chosen == {True}


def _check_some(
    step: FinetuneStep, loaded: Loaded, weights: dict[str, torch.Tensor], *, resumes: bool
) -> None:
    method = METHODS[step.method]
    if not any(param.requires_grad for param in loaded.module.parameters()):
        what = "--freeze leaves nothing to train" if step.freeze else "nothing to train: all is frozen"
        raise UsageError(212, what, hint="freeze less")
    if not weights and method.cuts != "never":
        raise UsageError(211, "no prunable tensor is left to train", hint="freeze less, or --method dense")
    empty = [] if resumes or not method.holds_zeros else _empty(weights)
    if empty:
        what = f"all zero, decay would hold it there: {', '.join(empty[:4])}"
        raise InputError(348, what, hint="--exclude it")


def _empty(weights: dict[str, torch.Tensor]) -> list[str]:
    """Those with nothing but zeros. All processes call it."""
    some = ranks.all_reduce_max([float(ranks.local_tensor(weight).any()) for weight in weights.values()])
    return sorted(out for out, there in zip(weights, some, strict=True) if not there)


def _dtype_name(value: torch.Tensor) -> str:
    return "F32" if value.dtype.is_floating_point else "C64" if value.is_complex() else "I64"


def in_words(step: FinetuneStep, control: SparsityControl) -> Brief:
    """The run in one line, and with all that decides it, for the terminal and the manifest."""
    return Brief(_in_short(step, control), _in_full(step, control))


def _in_short(step: FinetuneStep, control: SparsityControl) -> str:
    method, target = control.method, control.target
    phased = target is not None and method.cuts != "start"
    text = f"{control.phases.steps} steps{f': {control.phases.in_words()}' if phased else ''}. Method: "
    text += (method.words or step.method) + method.in_short()
    if method.cuts == "never":
        return f"{text}, nothing is pruned."
    size = next((f"{control.size / one:.3g} {unit}" for one, unit in _UNITS if control.size >= one), "")
    of = f"of {size or control.size} weights"
    if target is None:
        return f"{text}, no target: weights under about {control.w_kill:.3g} {of} go to zero."
    return f"{text}, {SCORES[step.score].words}, target {100 * float(target):.4g} % {of}."


def _in_full(step: FinetuneStep, control: SparsityControl) -> str:
    method, steps = control.method, control.phases.steps
    text = f"{steps} steps, method {step.method}, {len(control.weights)} tensors of {control.size:,} weights"
    if step.condition != "none":
        text += f", conditioned by {step.condition}"
    if said := step.options([name for name, known in about(FinetuneStep).items() if known.noted]):
        text += f", {' '.join(said)}"
    if control.target is not None and method.cuts != "start":
        text += f"; steps: {control.phases.in_words()}"
    if control.target is not None:
        text += f"; chosen by {step.score}"
        if step.cut == "gradual":
            text += ", cut as the target rises"
        if step.keep_zeros and control.start > float(control.target) * control.size:
            text += f"; --keep-zeros keeps the {control.start:,} zeros of MODEL, more than the target"
    return text + method.in_full()
