"""Robustness to the coming cut: the ridge-affine perturbation of Ye et al. 2024, arXiv 2409.09245.

    x_hat = alpha * q + beta,   alpha = Cov(x, q) / (Var(q) + r),   beta = mean(x) - alpha * mean(q)
    per row

x is a row and q the row with its small entries zeroed, as the cut would leave it. The forward pass in
training sees x_hat, through which the gradient flows; the weights themselves are never perturbed. Differs
from the paper: r is a thousandth of Var(x), so that the scale of a layer does not matter; beta fades to 0
over the phase, since a beta that is left would make the stored tensor dense, and what is exported is the
weight itself. Evaluation sees the weight.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lpsparse.training.conditioning.base import Overlay, check_share

_RIDGE = 1e-3


def ridge_affine(x: Tensor, q: Tensor, ridge: float, keep_beta: float = 1.0) -> Tensor:
    """x_hat of (rows, rest); `keep_beta` times beta is added. A constant row of q gives its mean."""
    x_mean, q_mean = x.mean(1, keepdim=True), q.mean(1, keepdim=True)
    covariance = ((x - x_mean) * (q - q_mean)).mean(1, keepdim=True)
    variance = (q - q_mean).square().mean(1, keepdim=True)
    spread = (x - x_mean).square().mean(1, keepdim=True)
    alpha = covariance / (variance + ridge * spread).clamp(min=torch.finfo(x.dtype).tiny)
    return alpha * q + keep_beta * (x_mean - alpha * q_mean)


class Denoise(Overlay):
    takes: ClassVar[dict[str, str]] = {"sparsity": "target_sparsity"}

    def __init__(
        self, model: nn.Module, names: Iterable[str] | None = None, *, sparsity: float = 0.5, **options: Any
    ) -> None:
        check_share(sparsity)
        super().__init__(model, names, **options)
        self.sparsity, self.share = sparsity, 0.0

    def progress(self, share: float) -> None:
        self.share = min(1.0, share)

    def active(self) -> bool:
        return self.share < 1 and self.sparsity > 0

    def effective(self, name: str, v: Tensor) -> Tensor:
        item = self.weights[name]
        rows = item.rows(v)
        dropped = int(self.sparsity * rows.shape[1])
        if dropped == 0:
            return v
        tau = rows.detach().abs().kthvalue(dropped, dim=1, keepdim=True).values
        q = rows * (rows.detach().abs() > tau)
        return item.unrows(ridge_affine(rows, q, _RIDGE, 1 - self.share))
