"""Deep weight factorisation: Kolb et al. 2025, arXiv 2502.02496; with two factors, spred (Ziyin and Wang
2023, arXiv 2210.01212).

    w = w_1 * ... * w_D,   (q / 2) * sum of ||w_d||^2  =  (q / p) * ||w||_p^p at its optimum, p = 2 / D

From a checkpoint w_1 = sign(w) |w|**(1/D) and every other factor |w|**(1/D), so that step 0 computes what
the checkpoint computes. The gradient of a factor is the weight's times the other factors. Differs from the
paper: the penalty is a decoupled decay of the factors, q = lambda_p, whatever the optimizer, by default at
a strength at which a product that the loss does not hold falls to a twentieth over the phase; the paper
trains from scratch with an initialisation of its own and large learning rates.
"""

import math
from typing import TYPE_CHECKING, Any, Literal

from lpsparse.training.methods import Method

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lpsparse.training.control import SparsityControl

_LEAST = 1e-30  # a product under it is as good as zero, and follows nothing
_FALL = 20.0  # of a product that nothing holds, over the phase


class Dwf(Method):
    words = "deep weight factorisation"
    shards = False

    def __init__(self, control: "SparsityControl") -> None:
        super().__init__(control)
        self.factors: Factors | None = None

    def begin(self) -> None:
        control, step = self.control, self.control.step
        given = step.lambda_p
        if given != "auto" and step.lambda_convention == "authors":
            given *= 2 / step.factors  # p = 2 / D
        self.factors = Factors(control.weights, control.optimizer, step.factors, control.sum_lr, given)

    def before_cut(self) -> None:
        if self.factors is not None:
            self.factors.remove()
        self.factors = None

    def state_dict(self) -> dict[str, Any]:
        return {"factors": None if self.factors is None else self.factors.factors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["factors"] is None:
            self.before_cut()
        for name, saved in (state["factors"] or {}).items():
            assert self.factors is not None
            for factor, value in zip(self.factors.factors[name], saved, strict=True):
                factor.copy_(value)


class Factors:
    """Stands in for `weights` in `optimizer` until `remove`; the weights follow as products after each
    step."""

    def __init__(
        self,
        weights: "dict[str, Tensor]",
        optimizer: "Optimizer",
        depth: int,
        sum_lr: float,
        lambda_p: float | Literal["auto"],
    ) -> None:
        from torch import no_grad

        from lpsparse.training.attached import around_step, own_rate

        self.weights, self.optimizer = weights, optimizer
        self.factors = {name: _split(weight.detach(), depth) for name, weight in weights.items()}
        self.decay = math.log(_FALL) / (depth * sum_lr) if lambda_p == "auto" else lambda_p
        groups: list[dict[str, Any]] = list(optimizer.param_groups)
        for group in groups:
            held = {id(param) for param in group["params"]}
            mine = [each for name, own in self.factors.items() if id(weights[name]) in held for each in own]
            if mine:
                optimizer.add_param_group({"params": mine, "weight_decay": 0.0, "lr": own_rate(group)})
        self._attached = around_step(
            optimizer, "deep weight factorisation", no_grad()(self._before), no_grad()(self._after)
        )

    def _before(self) -> None:
        """Decay and gradients of the factors, which follow where conditioning has put the weights; the
        weights themselves are not moved by the optimizer."""
        import torch

        groups: list[dict[str, Any]] = self.optimizer.param_groups  # loading a state makes new ones
        rates = {id(param): float(group["lr"]) for group in groups for param in group["params"]}
        for name, factors in self.factors.items():
            weight, product = self.weights[name], _product(factors)
            grad, weight.grad = weight.grad, None
            moved = torch.where(product.abs() > _LEAST, weight.detach() / product, 1.0)
            root = moved.abs().pow_(1 / len(factors))
            for factor in factors:
                factor.mul_(root).mul_(math.exp(-rates[id(factor)] * self.decay))
            for k, factor in enumerate(factors):
                factor.grad = None if grad is None else grad * _product(factors[:k] + factors[k + 1 :])

    def _after(self) -> None:
        for name, factors in self.factors.items():
            self.weights[name].copy_(_product(factors))
            for factor in factors:
                factor.grad = None

    def remove(self) -> None:
        """Leave the optimizer with the weights alone; their own averages start from nothing."""
        self._attached.remove()
        ours = {id(factor) for factors in self.factors.values() for factor in factors}
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        groups[:] = [group for group in groups if not any(id(param) in ours for param in group["params"])]
        for factors in self.factors.values():
            for factor in factors:
                self.optimizer.state.pop(factor, None)


def _split(weight: "Tensor", depth: int) -> "list[nn.Parameter]":
    from torch import nn

    root = weight.abs().pow(1 / depth)
    return [nn.Parameter(weight.sign() * root if k == 0 else root.clone()) for k in range(depth)]


def _product(factors: "list[nn.Parameter]") -> "Tensor":
    import torch

    return torch.stack([factor.detach() for factor in factors]).prod(0)
