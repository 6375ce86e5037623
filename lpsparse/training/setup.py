"""What a run is made of: its autos, the weights that may be cut, the optimizer, and conditioning."""

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lpsparse.errors import InputError, UsageError
from lpsparse.parallel import ranks
from lpsparse.pruning.targets import Chosen, check_chosen, decide, no_match
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training import optimizers
from lpsparse.training.allocation import SETTLED
from lpsparse.training.conditioning import condition
from lpsparse.training.conditioning.base import Conditioning
from lpsparse.training.model import Loaded
from lpsparse.training.modules import roles_of
from lpsparse.training.phases import plan_phases
from lpsparse.training.tasks.base import Task

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def resolve_auto(step: FinetuneStep, model: nn.Module, steps: int) -> FinetuneStep:
    """`step` of `steps` optimizer steps with its auto replaced by what was best on models of this kind
    (docs/method.md). Raises UsageError for a fisher score that comes to nothing."""
    batch_norm = any(isinstance(part, BATCH_NORMS) for part in model.modules())
    knows = step.target_sparsity is None or round(step.decay_share * steps) >= 2 * SETTLED
    if step.score == "fisher" and not knows:
        what = f"--score fisher: the cut comes within {2 * SETTLED} steps, before gradients have an average"
        raise UsageError(214, what, hint="train longer, or use --score magnitude")
    fisher = step.method == "lp" and step.optimizer == "adamw" and knows and not batch_norm
    # A held norm gives back what decay takes from the weights that stay; selective decay takes nothing.
    target = step.target_sparsity is not None
    rows = step.method == "lp" and not (target and step.selective) and not batch_norm
    auto = {
        "score": "fisher" if fisher else "magnitude",
        "condition": "rows" if rows else "none",
        "cut": "gradual" if step.method == "lp" and target and batch_norm else "end",
    }
    return step.model_copy(update={key: best for key, best in auto.items() if getattr(step, key) == "auto"})


def in_short(step: FinetuneStep, steps: int) -> str | None:
    """What to say, before it starts, of a run whose steps are too few for its phases; None where they do."""
    least = math.ceil(2 * SETTLED / step.decay_share)
    if step.target_sparsity is None or step.method in ("one-shot", "rigl") or steps >= least:
        return None
    cut_at = plan_phases(step, steps).cut_at
    what = f"{steps} steps are few: the cut comes after {cut_at}, when gradients have no average yet"
    return f"{what}; give --steps {least} or more"


def check_shard(step: FinetuneStep) -> None:
    """Raises UsageError for what needs whole tensors, or other processes."""
    if ranks.world_size() == 1:
        raise UsageError(
            232, "--shard: there is one process to share among", hint="add --processes 2 or more"
        )
    whole = {
        "--condition": step.condition != "none" and step.condition,
        "--method": step.method in ("dwf", "rigl") and step.method,
        "--optimizer": step.optimizer == "muon" and step.optimizer,
        "--mixed-precision": step.mixed_precision == "fp16" and step.mixed_precision,
        "--allocation": step.allocation != "global" and step.allocation,
    }
    for name, value in whole.items():
        if value:
            what = f"{name} {value} needs whole tensors, which --shard does not keep together"
            raise UsageError(233, what, hint=f"leave --shard out, or choose another {name}")


def leaves_unused(task: Task, device: torch.device) -> bool:
    """Whether a parameter that is trained gets no gradient: DDP has to look for such."""
    module = task.loaded.module.eval()
    batch = task.collate([task.train[0]])
    batch = batch if task.augment is None else task.augment(batch, [0])
    logits, labels = task.predict(module, {key: value.to(device) for key, value in batch.items()})
    torch.nn.functional.cross_entropy(logits, labels).backward()
    unused = any(param.requires_grad and param.grad is None for param in module.parameters())
    module.zero_grad(set_to_none=True)
    return unused


def prepare_module(step: FinetuneStep, model: Any) -> None:
    """--checkpointing and --compile, in place. Raises UsageError for a model that cannot be checkpointed."""
    if step.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            what = f"--checkpointing: {type(model).__name__} has no gradient checkpointing"
            raise UsageError(255, what, hint="use --accumulate for less memory")
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
        (enable or model.gradient_checkpointing_enable)()
    if step.compile:
        model.compile()


def choose_weights(
    step: FinetuneStep, loaded: Loaded, *, resumes: bool = False, held: set[int] | None = None
) -> tuple[Chosen, dict[str, torch.Tensor]]:
    """Which tensors of OUT may be cut, and why not, and those that are cut and trained here, by their name in
    OUT. `step.freeze` is carried out; what is frozen already stays so. `held` are the ids of the optimizer's
    parameters, where there is one."""
    names, parts = loaded.names, loaded.parts()
    outs = [out for out in names.values() if out not in parts] + list(loaded.fused)
    for pattern in step.freeze:
        if not any(fnmatchcase(out, pattern) for out in outs):
            raise no_match("--freeze", pattern, outs)
    state = loaded.module.state_dict()
    described = [
        (out, _dtype_name(state[name]), tuple(state[name].shape))
        for name, out in names.items()
        if out not in parts
    ]
    described += [(out, _dtype_name(state[name]), shape) for out, (name, shape) in loaded.fused.items()]
    config: Any = getattr(loaded.module, "config", None)
    told = {names[name]: role for name, role in roles_of(loaded.module).items() if name in names}
    config = config.to_dict() if callable(getattr(config, "to_dict", None)) else None  # transformers' own
    by = type(loaded.module).__name__
    prunable = decide(described, step.include, step.exclude, config, told, by)
    check_chosen(prunable, step.include, step.exclude)
    weights: dict[str, torch.Tensor] = {}
    left: dict[str, str] = {}  # name in OUT -> why it is not cut here, although it might be
    first: dict[int, str] = {}
    for name, param in loaded.module.named_parameters(remove_duplicate=False):
        out = names.get(name, name)
        files = parts.get(out, [out])
        if any(fnmatchcase(each, glob) for glob in step.freeze for each in files):
            param.requires_grad_(False)
            left |= dict.fromkeys(files, "--freeze")
        elif not param.requires_grad:
            left |= dict.fromkeys(files, "frozen")
        elif held is not None and id(param) not in held:
            left |= dict.fromkeys(files, "not in the optimizer")
        if first.setdefault(id(param), out) != out:
            left |= dict.fromkeys(files, f"tied to {first[id(param)]}")
            continue
        chosen = {each in prunable and prunable[each].prunable for each in files}
        if len(chosen) > 1:
            what = f"--include or --exclude takes only a part of what transformers fuses: {files[0]}, ..."
            raise UsageError(213, what, hint=f"take all {len(files)} of them, or none")
        if chosen == {True} and left.keys().isdisjoint(files):
            weights[out] = param
    if not any(param.requires_grad for param in loaded.module.parameters()):
        what = "--freeze leaves nothing to train" if step.freeze else "nothing to train: all is frozen"
        raise UsageError(212, what, hint="freeze less")
    if not weights and step.method != "dense":
        raise UsageError(211, "no prunable tensor is left to train", hint="freeze less, or --method dense")
    empty = [] if resumes or step.method != "lp" else _empty(weights)
    if empty:
        raise InputError(
            348, f"all zero, decay would hold it there: {', '.join(empty[:4])}", hint="--exclude it"
        )
    kept = {each for out in weights for each in parts.get(out, [out])}
    rest = {out: each for out, each in prunable.items() if each.prunable and out not in kept}
    rest = {out: replace(each, prunable=False, reason=left.get(out, "buffer")) for out, each in rest.items()}
    return prunable | rest, weights


def _empty(weights: dict[str, torch.Tensor]) -> list[str]:
    """Those with nothing but zeros. All processes call it."""
    some = ranks.all_reduce_max([float(ranks.local_tensor(weight).any()) for weight in weights.values()])
    return sorted(out for out, there in zip(weights, some, strict=True) if not there)


def _dtype_name(value: torch.Tensor) -> str:
    return "F32" if value.dtype.is_floating_point else "C64" if value.is_complex() else "I64"


def make_conditioning(
    step: FinetuneStep, model: nn.Module, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> Conditioning | None:
    if step.condition == "none" or not weights:
        return None
    wanted = {id(weight) for weight in weights.values()}
    names = [name for name, param in model.named_parameters() if id(param) in wanted]
    options: dict[str, Any] = {"gain_lr_ratio": step.gain_lr_ratio} if step.condition == "weight-norm" else {}
    if step.condition in ("l1-rows", "denoise"):
        options["sparsity"] = float(step.target_sparsity or 0)
    if step.condition == "l1-rows":
        options["path_penalty"] = step.path_penalty
    conditioning = condition(model, step.condition, names, **options)
    conditioning.attach(optimizer)
    return conditioning


def make_optimizer(
    step: FinetuneStep, model: nn.Module, weights: dict[str, torch.Tensor]
) -> torch.optim.Optimizer:
    """The base optimizer; its own weight decay acts only where L_p decay does not."""
    chosen = {id(weight) for weight in weights.values()} if step.method in ("lp", "l1") else set[int]()
    trained = [param for param in model.parameters() if param.requires_grad]
    plain = [param for param in trained if id(param) not in chosen]
    groups = [
        {"params": [param for param in trained if id(param) in chosen], "weight_decay": 0.0},
        {"params": [param for param in plain if param.ndim >= 2], "weight_decay": step.weight_decay},
        {"params": [param for param in plain if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return optimizers.make(step.optimizer, groups, step.lr)
