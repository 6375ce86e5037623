"""Row conditioning: Saratchandran, Wang and Lucey 2024 (ECCV), arXiv 2409.03424, with frozen gains.

    W_eff = diag(g) * V / ||V||_row          row = one output unit, g = the checkpoint's own row norms

Differs from the paper: g is not 1, so that step 0 computes what the checkpoint computes. The gradient flows
through the norm: dL/dv = (g / ||v||) * (I - v v^T / ||v||^2) dL/dw. Since every row is projected back to
||v|| = g before each forward pass, V equals W_eff, and that gradient is the plain one without its part along
the row. Where training leaves weights out of the forward pass, V is the row without them, and the factor g /
||v|| of what it was before is left out of the gradient.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lpsparse.training.conditioning.base import Conditioned, Conditioning, as_rows, row_scale


def normalize_rows(v: Tensor, g: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """W_eff of the definition. A zero row stays zero with a finite gradient."""
    norm = as_rows(v, axis, groups).square().sum(1).clamp(min=torch.finfo(v.dtype).tiny).sqrt()
    return v * row_scale(v, g / norm, axis, groups)


def tangent_(grad: Tensor, w: Tensor, axis: int = 0, groups: int = 1) -> Tensor:
    """Take from `grad`, in place, its part along each row of `w`: dL/dV at ||v|| = g."""
    rows, slopes = as_rows(w, axis, groups), as_rows(grad, axis, groups)
    share = (rows * slopes).sum(1) / rows.square().sum(1).clamp(min=torch.finfo(w.dtype).tiny)
    return grad.sub_(w * row_scale(w, share, axis, groups))


class RowConditioning(Conditioning):
    """Frozen-norm row conditioning of a model's weights."""

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None, **options: Any) -> None:
        super().__init__(model, names, **options)
        self.norms = {name: item.rows().norm(dim=1) for name, item in self.weights.items()}  # g
        self._versions = {name: item.weight._version for name, item in self.weights.items()}
        self.handles.append(model.register_forward_pre_hook(self._enter))
        for name, item in self.weights.items():
            self.handles.append(item.weight.register_post_accumulate_grad_hook(self._hook(name, item)))

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.retract()

    def _hook(self, name: str, item: Conditioned):
        def hook(weight: Tensor) -> None:
            if weight.grad is not None:
                self.project_gradient(name, item, weight.grad)

        return hook

    def project_gradient(self, name: str, item: Conditioned, grad: Tensor) -> None:
        """Turn dL/dW, in place, into dL/dV."""
        tangent_(grad, item.weight.detach(), item.axis, item.groups)

    @torch.no_grad()
    def retract(self) -> None:
        """Put every row back to its norm, where the weight changed since. Rows that became zero stay zero."""
        for name, item in self.weights.items():
            weight = item.weight
            if weight._version != self._versions[name]:
                weight.copy_(normalize_rows(weight, self.norms[name], item.axis, item.groups))
                self._versions[name] = weight._version

    def state_dict(self) -> dict[str, Any]:
        return {"norms": dict(self.norms), "changed": self.changed(self._versions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, norms in state["norms"].items():
            self.norms[name].copy_(norms)
        self._versions = self.versions(state["changed"])

    def smallest_norm(self) -> float:
        """The smallest norm of a row that is not zero; inf when there is none."""
        sizes = [item.rows().norm(dim=1) for item in self.weights.values()]
        living = torch.cat([size[size > 0] for size in sizes]) if sizes else torch.zeros(0)
        return float(living.min()) if living.numel() else float("inf")
