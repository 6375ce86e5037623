"""Rows of constant L1 norm, and a ramped projection to exact zeros: PSiLON, Biswas 2024, arXiv 2404.19112.

    W_j = s * g_j * V_j / ||V_j||_1,   penalty  lambda * |prod over layers of s|, while ramping:  W = (1 -
    c) * V + c * Proj(V),   Proj(v) = sign(v) * relu(|v| - tau), rescaled to v's L1 norm

Every layer has one shared gain s. Differs from the paper: the rows keep g_j, the checkpoint's own L1
norms, so that s starts at 1 and step 0 computes what the checkpoint computes, and the 1-path-norm is taken
relative to the checkpoint's, where it is the product of the gains. The paper projects on the simplex of
radius 1, which is not scale-invariant and knows no target; here the radius of each row is the one at which
the asked share of it is zero (tau = its largest dropped magnitude), found by sorting as in the paper's own
projection. The bias stays outside the row.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lpsparse.errors import UsageError
from lpsparse.training.attached import around_step
from lpsparse.training.conditioning.base import Overlay, check_share


def normalize_l1(v: Tensor, g: Tensor) -> Tensor:
    """(rows, rest) with the L1 norms `g`; a zero row stays zero."""
    sizes = v.abs().sum(1)
    return v * torch.where(sizes > 0, g / sizes.clamp(min=torch.finfo(v.dtype).tiny), 0.0)[:, None]


def project_simplex(v: Tensor, dropped: int) -> Tensor:
    """Each row of (rows, rest) soft-thresholded so that its `dropped` smallest are zero, at its own L1
    norm. A row with nothing over the threshold (ties) keeps its last ones as they are."""
    if dropped == 0:
        return v
    size = v.abs()
    order = size.detach().argsort(dim=1, stable=True)
    tau = size.gather(1, order[:, dropped - 1 : dropped])
    soft = v.sign() * (size - tau).relu()
    hard = v.scatter(1, order[:, :dropped], 0.0)
    return normalize_l1(torch.where((soft != 0).any(1, keepdim=True), soft, hard), size.sum(1))


class L1Rows(Overlay):
    takes: ClassVar[dict[str, str]] = {"sparsity": "target_sparsity", "path_penalty": "path_penalty"}

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        sparsity: float = 0.0,
        path_penalty: float = 0.0,
        **options: Any,
    ) -> None:
        check_share(sparsity)
        if not path_penalty >= 0:
            raise UsageError(229, f"path_penalty = {path_penalty}", hint="give 0 or more")
        super().__init__(model, names, **options)
        self.sparsity, self.penalty = sparsity, path_penalty
        self.norms = {name: item.rows().abs().sum(1) for name, item in self.weights.items()}  # g
        self.gains = {name: nn.Parameter(norms.new_ones(())) for name, norms in self.norms.items()}  # s
        self.ramp = 0.0
        self._fresh = False  # a backward pass has left gradients that are not split yet

    def attach(self, optimizer: Optimizer) -> None:
        self._check_held(optimizer)
        self._give(optimizer, self.gains)
        hooks = around_step(optimizer, "conditioning", self._before, self._spend, uncover=self.restore)
        self.handles.append(hooks)

    def _before(self) -> None:
        self.restore()
        # Here, and not with the split: by now a loss scaler has taken its factor out of the gradients.
        self._penalize()

    def active(self) -> bool:
        return 0 < self.ramp < 1 and self.sparsity > 0

    @torch.no_grad()
    def progress(self, share: float) -> None:
        """At the end of the ramp V itself is projected, once; then there is nothing left to overlay."""
        if share >= 1 > self.ramp and self.sparsity > 0:
            for name, item in self.weights.items():
                item.weight.copy_(item.unrows(self._project(name, item.rows())))
        self.ramp = min(1.0, share)

    def _project(self, name: str, rows: Tensor) -> Tensor:
        return project_simplex(rows, int(self.sparsity * rows.shape[1]))

    def effective(self, name: str, v: Tensor) -> Tensor:
        item = self.weights[name]
        rows = item.rows(v)
        return item.unrows((1 - self.ramp) * rows + self.ramp * self._project(name, rows))

    def _cover(self, module: nn.Module, _: Any) -> None:
        super()._cover(module, _)
        self._fresh = self._fresh or (module.training and torch.is_grad_enabled())

    @torch.no_grad()
    def restore(self) -> None:
        """V and its gradient, split; here, since the weight is still the one that the forward pass saw."""
        super().restore()
        if self._fresh:
            self._split()
        self._fresh = False

    def _split(self) -> None:
        """dL/dW into dL/ds and dL/dV at ||V||_1 = s * g. Backward passes of one step add up: the earlier
        ones' dL/dV has no part along the row."""
        for name, item in self.weights.items():
            weight, gain = item.weight, self.gains[name]
            if weight.grad is None:
                continue
            rows, slopes = item.rows(), item.rows(weight.grad)
            along = (rows * slopes).sum(1)  # per output unit
            part = along.sum() / gain.detach()
            gain.grad = part if gain.grad is None else gain.grad + part
            sizes = rows.abs().sum(1).clamp(min=torch.finfo(rows.dtype).tiny)
            weight.grad.copy_(item.unrows(slopes - rows.sign() * (along / sizes)[:, None]))

    @torch.no_grad()
    def _penalize(self) -> None:
        if not self.gains:
            return
        path = torch.stack([gain.detach() for gain in self.gains.values()]).prod()
        for gain in self.gains.values():
            if gain.grad is not None:
                gain.grad += self.penalty * path.abs() / gain.detach()

    def _spend(self) -> None:
        for gain in self.gains.values():
            gain.grad = None

    @torch.no_grad()
    def retract(self) -> None:
        for name, item in self.weights.items():
            gain = self.gains[name].clamp_(min=1e-6)
            item.weight.copy_(item.unrows(normalize_l1(item.rows(), gain * self.norms[name])))

    def state_dict(self) -> dict[str, Any]:
        return {"ramp": self.ramp, "gains": {name: gain.detach() for name, gain in self.gains.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ramp = state["ramp"]
        with torch.no_grad():
            for name, gain in state["gains"].items():
                self.gains[name].copy_(gain)
