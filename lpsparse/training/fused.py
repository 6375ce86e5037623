"""LpAdamW: AdamW and decoupled L_p decay in one pass over memory.

The arithmetic is that of `torch.optim.AdamW` (its own weight decay 0) followed by the divisor of the old
weight (`decay.lp_divisor`); torch.compile makes one loop of it, so that each weight, gradient and moment is
read once: seven memory streams, where hooks take eleven or twelve. Where no compiler is found, AdamW and
the divisor do the same one after the other.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from lpsparse.errors import UsageError
from lpsparse.training.compiled import compiled
from lpsparse.training.decay import CONVENTION, check_precision, check_settings, divide_, loading, lp_divisor


class LpAdamW(AdamW):
    """AdamW (its own weight decay 0) with decoupled L_p decay (arXiv 2404.10824) of every parameter of 2 or
    more dimensions.

    The state dict is AdamW's, with `lp_p` and `lp_lambda` in its groups. Compiles at the first step, some
    seconds once a process; with `one_pass=False`, p >= 2 or no compiler it takes AdamW's step and the
    factor apart: the same numbers up to rounding. Raises UsageError as LpDecay does.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        p: float = 0.5,
        lambda_p: float,
        one_pass: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        check_settings(p, lambda_p)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
        self.one_pass = one_pass
        self.defaults.update(
            lp_p=p, lp_lambda=lambda_p, lp_convention=CONVENTION
        )  # of groups added later too
        for group in self.param_groups:
            for key in ("lp_p", "lp_lambda", "lp_convention"):
                group.setdefault(key, self.defaults[key])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "one_pass": self.one_pass}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_loading(self, state_dict))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            check_precision(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rows = [self._row(param) for param in group["params"] if param.grad is not None]
            decays = bool(group["lp_lambda"] and group["lr"])
            moved = [decays and row[0].ndim >= 2 and row[0].requires_grad for row in rows]
            self._plain(group, [row for row, yes in zip(rows, moved, strict=True) if not yes])
            self._decayed(group, [row for row, yes in zip(rows, moved, strict=True) if yes])
        return loss

    def _row(self, param: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The parameter, its gradient and what the state has for it, as AdamW begins it."""
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("LpAdamW does not support sparse gradients")  # as torch's AdamW
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"]

    def _decayed(self, group: dict[str, Any], rows: list[Any]) -> None:
        shared: dict[tuple[float, torch.device], Tensor] = {}  # the scalars of a step, moved once
        kernels = [compiled("step", row[0], group["lp_p"]) if self.one_pass else None for row in rows]
        for (w, grad, exp_avg, exp_avg_sq, step), kernel in zip(rows, kernels, strict=True):
            if kernel is not None:
                step += 1
                key = (float(step), w.device)
                shared[key] = shared[key] if key in shared else _scalars(group, *key)
                flat = (each.detach().view(-1) for each in (w, grad.contiguous(), exp_avg, exp_avg_sq))
                kernel(*flat, shared[key])
        rows = [row for row, kernel in zip(rows, kernels, strict=True) if kernel is None]
        if rows:
            a, p, q = float(group["lr"]), group["lp_p"], group["lp_lambda"]
            divisors = [lp_divisor(row[0], a, p, q) for row in rows]
            self._plain(group, rows)
            for row, divisor in zip(rows, divisors, strict=True):
                divide_(row[0], divisor)

    def _plain(self, group: dict[str, Any], rows: list[Any]) -> None:
        if rows:
            params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*rows, strict=True))
            adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )


def _loading(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An AdamW's state, too. Raises UsageError for amsgrad and maximize; a weight decay warns and is left
    out."""
    state = loading(optimizer, state)
    for group in state["param_groups"]:
        if group.get("amsgrad") or group.get("maximize"):
            raise UsageError(235, "the state is of amsgrad or maximize", hint="load it into torch's AdamW")
        if group.get("weight_decay"):
            text = f"weight decay {group['weight_decay']} of the saved state: LpAdamW has none; left out"
            warnings.warn(text, stacklevel=3)
            group["weight_decay"] = 0.0
    return state


def _scalars(group: dict[str, Any], step: float, device: torch.device) -> Tensor:
    beta1, beta2 = group["betas"]
    a = float(group["lr"])
    values = (
        1 - beta1,
        1 - beta2,
        a / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        group["eps"],
        group["lp_p"] - 2,
        a * group["lp_lambda"],
    )
    return torch.tensor(values, dtype=torch.float32, device=device)
