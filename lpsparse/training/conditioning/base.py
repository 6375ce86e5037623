"""The base of all conditionings, and the two ways in which one works.

Projected: the tensor in the model is the effective weight, W = f(V) with V = W at every step; what is left of
the reparametrisation is its gradient, and a projection after each step. Overlaid: the forward pass sees f(V)
in the tensor's place, and V is back before the optimizer's step, with the gradient mapped through f.
Either way no parameter is renamed and no module is changed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lpsparse.errors import UsageError
from lpsparse.training.attached import around_step, own_rate

# Where the output units of a weight lie: see `as_rows`, `row_weights`.
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Conditioned:
    """One weight and where its output units lie."""

    weight: Tensor
    axis: int
    groups: int

    def rows(self, values: Tensor | None = None) -> Tensor:
        """(output units, rest) of `values`, of the weight's own shape; default the weight."""
        return as_rows(self.weight.detach() if values is None else values, self.axis, self.groups)

    def unrows(self, rows: Tensor) -> Tensor:
        return from_rows(rows, self.weight, self.axis, self.groups)


class Conditioning:
    """One method on one model; made by `condition(model, method)`. Methods that do nothing here
    are for subclasses."""

    takes: ClassVar[dict[str, str]] = {}  # option of `condition` -> the setting of `finetune` that gives it

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None, **options: Any) -> None:
        """Raises UsageError for an option that the method does not have, and for a name that the model has
        not. Frozen and complex weights are left alone."""
        if options:
            unknown = ", ".join(sorted(options))
            raise UsageError(224, f"{type(self).__name__} has no option {unknown}", hint="leave it out")
        self.weights: dict[str, Conditioned] = {}
        wanted = None if names is None else set(names)
        strange = sorted((wanted or set()) - {name for name, _ in model.named_parameters()})
        if strange:
            raise UsageError(228, f"no parameter {strange[0]}", hint="see model.named_parameters()")
        seen: set[int] = set()
        for name, weight, axis, groups in row_weights(model):
            moves = weight.requires_grad and not weight.is_complex()
            if moves and id(weight) not in seen and (wanted is None or name in wanted):
                seen.add(id(weight))
                self.weights[name] = Conditioned(weight, axis, groups)
        self.handles: list[Any] = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The hooks of a copy would be those of this model."""
        what = f"a conditioned model ({type(self).__name__}) cannot be copied or pickled"
        raise UsageError(259, what, hint="copy it before condition() or after fold(), or its state_dict()")

    def attach(self, optimizer: Optimizer) -> None:
        """Tell the method which optimizer moves the weights; call it before the first step. Raises UsageError
        when a conditioned weight is not the optimizer's."""
        self._check_held(optimizer)
        hooks = around_step(optimizer, "conditioning", self.restore, uncover=self.restore)
        self.handles.append(hooks)

    def _check_held(self, optimizer: Optimizer) -> None:
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        missing = [name for name, item in self.weights.items() if id(item.weight) not in held]
        if missing:
            what = f"{missing[0]} is not in the optimizer"
            raise UsageError(225, what, hint="attach the one that moves it, or give condition() its names")

    def _give(self, optimizer: Optimizer, gains: dict[str, nn.Parameter], ratio: float = 1.0) -> None:
        """Let the optimizer train `gains`, at `ratio` times the learning rate of their weights."""
        groups: list[dict[str, Any]] = list(optimizer.param_groups)
        for group in groups:
            held = {id(param) for param in group["params"]}
            mine = [gain for name, gain in gains.items() if id(self.weights[name].weight) in held]
            if mine:
                rate = ratio * own_rate(group)
                optimizer.add_param_group({"params": mine, "weight_decay": 0.0, "lr": rate})

    def progress(self, share: float) -> None:
        """Say how much of the phase in which weights go to zero is over, 0..1; before each step."""

    def restore(self) -> None:
        """After the backward pass: put V and its gradient back where the forward pass saw f(V)."""

    def retract(self) -> None:
        """After the optimizer's step: put the weights back where the method keeps them."""

    def state_dict(self) -> dict[str, Any]:
        """What the method keeps from step to step beside the weights; tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, whose weights are loaded."""

    def changed(self, versions: dict[str, int]) -> dict[str, bool]:
        """Which weights have changed since they had these versions."""
        return {name: item.weight._version != versions[name] for name, item in self.weights.items()}

    def versions(self, changed: dict[str, bool]) -> dict[str, int]:
        """The inverse, for the weights as they are: one that is as it should be is not put right again, which
        would round it once more."""
        return {name: item.weight._version - changed[name] for name, item in self.weights.items()}

    def remove(self) -> None:
        """Leave an ordinary model whose weights are the effective ones."""
        self.restore()
        self.retract()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def check_share(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise UsageError(229, f"sparsity = {sparsity}", hint="give 0 or more and less than 1")


class Overlay(Conditioning, ABC):
    """The forward pass in training sees `effective(V)`; evaluation sees V."""

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None, **options: Any) -> None:
        super().__init__(model, names, **options)
        self._stash: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # name -> V's values, leaf, f(leaf)
        self.handles.append(model.register_forward_pre_hook(self._cover))

    @abstractmethod
    def effective(self, name: str, v: Tensor) -> Tensor:
        """f(V) of one weight, differentiable."""

    def active(self) -> bool:
        return True

    def _cover(self, module: nn.Module, _: Any) -> None:
        if self._stash:
            # Evaluation between the passes of a step sees V, and the gradient stays due.
            for name, (values, _, seen) in self._stash.items():
                self.weights[name].weight.detach().copy_(seen.detach() if module.training else values)
            return
        self.retract()
        if not module.training or not torch.is_grad_enabled() or not self.active():
            return
        for name, item in self.weights.items():
            leaf = item.weight.detach().clone().requires_grad_()
            with torch.enable_grad():
                seen = self.effective(name, leaf)
            self._stash[name] = (leaf.detach(), leaf, seen)
            item.weight.detach().copy_(seen.detach())

    @torch.no_grad()
    def restore(self) -> None:
        for name, (values, leaf, seen) in self._stash.items():
            weight = self.weights[name].weight
            if weight.grad is not None:
                weight.grad.copy_(torch.autograd.grad(seen, leaf, weight.grad)[0])
            weight.copy_(values)
        self._stash.clear()


def as_rows(weight: Tensor, axis: int, groups: int = 1) -> Tensor:
    """A view or copy of `weight` as (output units, rest). `axis` is the output dimension.

    axis 1 is transformers' Conv1D (in, out) and transposed convolutions (in, out / groups, ...), whose
    output unit is a (group, channel) pair; axis -2 is a stack of experts (experts, out, in), one row an
    expert and output.
    """
    if axis == 0:
        return weight.reshape(weight.shape[0], -1)
    if axis == -2:
        return weight.reshape(-1, weight.shape[-1])
    split = weight.reshape(
        groups, weight.shape[0] // groups, weight.shape[1], -1
    )  # (groups, in, out, kernel)
    return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def from_rows(rows: Tensor, like: Tensor, axis: int, groups: int = 1) -> Tensor:
    """The inverse of `as_rows`: (output units, rest) in the shape of `like`."""
    if axis != 1:
        return rows.reshape(like.shape)
    inputs = like.shape[0] // groups
    split = rows.reshape(groups, like.shape[1], inputs, -1)  # (groups, out, in, kernel)
    return split.transpose(1, 2).reshape(like.shape)


def row_scale(weight: Tensor, scale: Tensor, axis: int, groups: int = 1) -> Tensor:
    """`scale`, one number an output unit, shaped so that it multiplies `weight`."""
    if axis == 0:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    if axis == -2:
        return scale.reshape(*weight.shape[:-1], 1)
    inputs = weight.shape[0] // groups
    spread = scale.reshape(groups, 1, weight.shape[1]).expand(groups, inputs, weight.shape[1])
    return spread.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def row_weights(model: nn.Module) -> Iterable[tuple[str, Tensor, int, int]]:
    """Weights whose output dimension is known: (parameter name, weight, axis, groups)."""
    for prefix, module in model.named_modules():
        weight = getattr(module, "weight", None)
        name = f"{prefix}.weight" if prefix else "weight"
        if isinstance(module, _TRANSPOSED):
            yield name, module.weight, 1, module.groups
        elif isinstance(module, _PLAIN):
            yield name, module.weight, 0, 1
        elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
            yield name, weight, 1, 1  # transformers stores (in, out)
        else:
            for key, value in module.named_parameters(recurse=False):
                if value.ndim == 3 and "expert" in prefix:
                    yield f"{prefix}.{key}", value, -2, 1
