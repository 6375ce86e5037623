"""Weight normalisation with learnable gains, and a learning rate of their own.

    W_eff = diag(g) * V / ||V||_row         (Salimans and Kingma 2016, arXiv 1602.07868, eq. 2)

g starts at the checkpoint's row norms. The polar form w = r * u / ||u|| of Chou, Rauhut and Ward 2023
(arXiv 2305.05448) is the same with a learning-rate ratio between radius and direction; ratio 0 is `rows`.
Projected like `rows`: ||V|| is put back to g after each step, so V = W_eff, dL/dV is the gradient without
its part along the row, and dL/dg is that part. Differs from the papers: g stays positive (a row that
reaches a millionth of its first norm stops there), so that no row flips.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lpsparse.errors import UsageError
from lpsparse.parallel.ranks import average_
from lpsparse.training.attached import around_step
from lpsparse.training.conditioning.base import Conditioned, as_rows
from lpsparse.training.conditioning.rows import RowConditioning

_LEAST = 1e-6  # of the first norm


class WeightNorm(RowConditioning):
    """Rows with learnable norms: `gains`, name -> (output units,) parameters that `attach` gives to the
    optimizer."""

    takes: ClassVar[dict[str, str]] = {"gain_lr_ratio": "gain_lr_ratio"}

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        gain_lr_ratio: float = 1.0,
        **options: Any,
    ) -> None:
        if not gain_lr_ratio >= 0:
            raise UsageError(229, f"gain_lr_ratio = {gain_lr_ratio}", hint="give 0 or more")
        super().__init__(model, names, **options)
        self.ratio = gain_lr_ratio
        self.gains = {name: nn.Parameter(norms.clone()) for name, norms in self.norms.items()}
        self._due = False  # whether a backward pass has left gradients that are not averaged
        self._floor = {name: _LEAST * norms for name, norms in self.norms.items()}

    def attach(self, optimizer: Optimizer) -> None:
        self._check_held(optimizer)
        after = None
        if self.gains and self.ratio:
            self._give(optimizer, self.gains, self.ratio)
            after = self._spend
        hooks = around_step(optimizer, "conditioning", self.restore, after, uncover=self.restore)
        self.handles.append(hooks)

    def _enter(self, module: nn.Module, _: Any) -> None:
        super()._enter(module, _)
        self._due = self._due or (module.training and torch.is_grad_enabled())

    def project_gradient(self, name: str, item: Conditioned, grad: Tensor) -> None:
        # Backward passes of one step add up: `grad` holds the tangent part of the earlier ones, which is
        # orthogonal to the row, so what is left along the row is this pass's part alone.
        rows, slopes = item.rows(), as_rows(grad, item.axis, item.groups)
        part = (rows * slopes).sum(1) / self.norms[name].clamp(min=torch.finfo(rows.dtype).tiny)
        gain = self.gains[name]
        gain.grad = part if gain.grad is None else gain.grad + part
        super().project_gradient(name, item, grad)

    def restore(self) -> None:
        """The mean of the gains' gradients over processes, before anything reads their norm; each process has
        seen its own, since gains are no part of the model."""
        if self._due:
            for gain in self.gains.values():
                gain.grad = torch.zeros_like(gain) if gain.grad is None else gain.grad
            average_([gain.grad for gain in self.gains.values() if gain.grad is not None])
        self._due = False

    @torch.no_grad()
    def _spend(self) -> None:
        """The step moved g; rows follow at the next retraction."""
        for name, gain in self.gains.items():
            gain.copy_(torch.maximum(gain, self._floor[name]))
            gain.grad = None
            self.norms[name] = gain.detach().clone()
            self._versions[name] = -1

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for name, gain in self.gains.items():
                gain.copy_(self.norms[name])
