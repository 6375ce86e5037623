"""Row conditioning: Saratchandran, Wang and Lucey 2024 (ECCV), arXiv 2409.03424, with frozen gains.

    W_eff = diag(g) * V / ||V||_row          row = one output unit, g = the checkpoint's own row norms

Differs from the paper: g is not 1, so that step 0 computes what the checkpoint computes. The gradient flows
through the norm: dL/dv = (g / ||v||) * (I - v v^T / ||v||^2) dL/dw. Since every row is projected back to
||v|| = g after each step, V equals W_eff, and that gradient is the plain one without its part along the row.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


def row_scale(weight: Tensor, scale: Tensor, axis: int, groups: int = 1) -> Tensor:
    """`scale`, one number an output unit, shaped so that it multiplies `weight`."""
    if axis == 0:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    if axis == -2:
        return scale.reshape(*weight.shape[:-1], 1)
    inputs = weight.shape[0] // groups
    spread = scale.reshape(groups, 1, weight.shape[1]).expand(groups, inputs, weight.shape[1])
    return spread.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def normalize_rows(v: Tensor, g: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """W_eff of the definition. A zero row stays zero with a finite gradient."""
    norm = as_rows(v, axis, groups).square().sum(1).clamp(min=torch.finfo(v.dtype).tiny).sqrt()
    return v * row_scale(v, g / norm, axis, groups)


def tangent_(grad: Tensor, w: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """Take from `grad`, in place, its part along each row of `w`: dL/dV at ||v|| = g."""
    rows, slopes = as_rows(w, axis, groups), as_rows(grad, axis, groups)
    share = (rows * slopes).sum(1) / rows.square().sum(1).clamp(min=torch.finfo(w.dtype).tiny)
    return grad.sub_(w * row_scale(w, share, axis, groups))


class RowConditioning:
    """Frozen-norm row conditioning of a model's weights; made by `condition(model, "rows")`."""

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        self.weights: dict[str, tuple[Tensor, Tensor, int, int]] = {}  # name -> weight, norms g, axis, groups
        wanted = None if names is None else set(names)
        seen: set[int] = set()
        for name, weight, axis, groups in _row_weights(model):
            if weight.requires_grad and id(weight) not in seen and (wanted is None or name in wanted):
                seen.add(id(weight))
                norms = as_rows(weight.detach(), axis, groups).norm(dim=1)
                self.weights[name] = (weight, norms, axis, groups)
        self._versions = {name: weight._version for name, (weight, *_) in self.weights.items()}
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(lambda *_: self.retract())]
        for weight, _, axis, groups in self.weights.values():
            self._handles.append(weight.register_post_accumulate_grad_hook(_tangent_hook(axis, groups)))

    @torch.no_grad()
    def retract(self) -> None:
        """Put every row back to its norm, where the weight changed since. Rows that became zero stay zero."""
        for name, (weight, norms, axis, groups) in self.weights.items():
            if weight._version != self._versions[name]:
                weight.copy_(normalize_rows(weight, norms, axis, groups))
                self._versions[name] = weight._version

    def smallest_norm(self) -> float:
        """The smallest norm of a row that is not zero; inf when there is none."""
        sizes = [
            as_rows(w.detach(), axis, groups).norm(dim=1) for w, _, axis, groups in self.weights.values()
        ]
        living = torch.cat([size[size > 0] for size in sizes]) if sizes else torch.zeros(0)
        return float(living.min()) if living.numel() else float("inf")

    def remove(self) -> None:
        self.retract()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _tangent_hook(axis: int, groups: int):
    def hook(weight: Tensor) -> None:
        if weight.grad is not None:
            tangent_(weight.grad, weight.detach(), axis, groups)

    return hook


def _row_weights(model: nn.Module) -> Iterable[tuple[str, Tensor, int, int]]:
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
