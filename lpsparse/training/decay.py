"""Decoupled L_p weight decay (pWD): Outmezguine and Levi 2024, arXiv 2404.10824, the "adiabatic" update.

    w_next = v * X / (X + a * q),   X = |w|**(2 - p)

w is the weight before the optimizer's step, v after it (its own weight decay 0), a the learning rate, q =
lambda_p. Differs from the paper's code: q is ours, p times their lambda (so that p = 2 is AdamW's weight
decay to first order); |w| > 1 and p >= 2 use the other form of the same factor, which cannot overflow;
magnitudes below 1e-30 become +0, so that CPU and GPU agree whatever they do with denormals.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lpsparse.errors import UsageError

FLUSH = 1e-30
_SETTINGS = ("lp_p", "lp_lambda", "lp_convention")  # keys in the optimizer's param_groups
CONVENTION = "ours"  # penalty (lambda_p / p) * ||w||_p^p; the authors' code means lambda * ||w||_p^p


def lp_factor(w: Tensor, lr: float, p: float, lambda_p: float) -> Tensor:
    """The factor F in [0, 1] of one step from the old weights `w`; any shape, float32 or float64."""
    q = lr * lambda_p
    size = w.abs()
    if p == 2:
        return torch.full_like(size, 1 / (1 + q))
    if p > 2:
        return 1 / (1 + q * size.pow(p - 2))
    power = size.pow(2 - p)
    small = power / (power + q)
    if not (size > 1).any():  # the usual case, and pow is what takes the time
        return small
    return torch.where(size > 1, 1 / (1 + q * size.clamp(min=1.0).pow(p - 2)), small)


def lp_(v: Tensor, w: Tensor, *, lr: float, p: float, lambda_p: float, below: float | None = None) -> Tensor:
    """Decay `v` in place by the factor of the old weights `w`; only where |w| < `below` when that is given.

    With lr or lambda_p 0, `v` is left as it is, bit for bit. An exact zero of `w` gives an exact zero for p
    < 2.
    """
    if lr == 0 or lambda_p == 0:
        return v
    factor = lp_factor(w, lr, p, lambda_p)
    if below is not None:
        factor = torch.where(w.abs() < below, factor, torch.ones_like(factor))
    v.mul_(factor)
    return v.masked_fill_(v.abs() < FLUSH, 0.0)


def kill_magnitude(p: float, lambda_p: float, sum_lr: float) -> float:
    """w_kill: every weight that the loss does not hold dies below this over a run. p < 2. (math: budget)"""
    return ((2 - p) * lambda_p * sum_lr) ** (1 / (2 - p))


def budget_lambda(p: float, magnitude: float, sum_lr: float) -> float:
    """The lambda_p whose w_kill is `magnitude` over a run whose learning rates add up to `sum_lr`."""
    return magnitude ** (2 - p) / ((2 - p) * sum_lr)


class LpDecay:
    """Decoupled L_p weight decay for any torch optimizer,
    attached by step hooks: go on calling optimizer.step().

    `params` are the tensors to decay; by default all of 2 or more dimensions. p, lambda_p and the convention
    live in the optimizer's param_groups (`lp_p`, `lp_lambda`), hence in its state dict. Runs once per real
    step, so a step that a loss scaler skips decays nothing; a tensor without a gradient is left alone; a
    tied tensor decays once. Raises UsageError for p <= 0, a negative lambda_p, and for bf16/fp16 parameters,
    which would swallow the decay.
    """

    def __init__(
        self, optimizer: Optimizer, *, p: float = 0.8, lambda_p: float, params: Iterable[Tensor] | None = None
    ) -> None:
        if not p > 0 or not lambda_p >= 0:
            raise UsageError(
                220, f"p = {p}, lambda_p = {lambda_p}: p > 0 and lambda_p >= 0", mend="see math of L_p"
            )
        chosen = None if params is None else {id(param) for param in params}
        self.optimizer = optimizer
        self.below: dict[int, float] | None = None  # id of a tensor -> decay only its weights under this
        self._ids: set[int] = set()
        self._old: dict[int, Tensor] = {}
        for group in optimizer.param_groups:
            group.update(zip(_SETTINGS, (p, lambda_p, CONVENTION), strict=True))
            for param in group["params"]:
                if (param.ndim >= 2) if chosen is None else (id(param) in chosen):
                    self._check(param)
                    self._ids.add(id(param))
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(self._loading),
        ]

    @staticmethod
    def _check(param: Tensor) -> None:
        if param.dtype in (torch.float16, torch.bfloat16):
            what = f"a {param.dtype} parameter of shape {tuple(param.shape)} swallows the decay"
            raise UsageError(221, what, mend="keep the parameters in float32 and use autocast")

    def set_lambda(self, lambda_p: float) -> None:
        for group in self.optimizer.param_groups:
            group["lp_lambda"] = lambda_p

    def remove(self) -> None:
        """Detach from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._old.clear()

    def _decayed(self) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if id(param) in self._ids:
                    yield param, group

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        active = (param for param, group in self._decayed() if group["lp_lambda"] and group["lr"])
        self._old = {id(param): param.detach().clone() for param in active}

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        overflow: Any = getattr(
            optimizer, "found_inf", None
        )  # a fused optimizer leaves the skipping to itself
        if overflow is not None and float(overflow):
            self._old.clear()
            return
        for param, group in self._decayed():
            old = self._old.pop(id(param), None)
            if old is not None and param.grad is not None:
                below = None if self.below is None else self.below.get(id(param), 0.0)
                lp_(
                    param,
                    old,
                    lr=float(group["lr"]),
                    p=group["lp_p"],
                    lambda_p=group["lp_lambda"],
                    below=below,
                )

    def _loading(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """The state to load, with our settings where it was saved without them."""
        groups: list[dict[str, Any]] = []
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=False):
            groups.append({key: group[key] for key in _SETTINGS} | saved)
            if saved.get("lp_p", group["lp_p"]) != group["lp_p"]:
                text = (
                    f"state was saved with p = {saved['lp_p']}, this decay was made with p = {group['lp_p']}"
                )
                warnings.warn(f"{text}; the saved one is used", stacklevel=3)
        groups += state["param_groups"][len(groups) :]  # too many: torch says so
        return {**state, "param_groups": groups}


class LpAdamW(AdamW):
    """AdamW (its own weight decay 0) with decoupled L_p decay of every parameter of 2 or more dimensions."""

    def __init__(
        self, params: Any, lr: float = 1e-3, *, p: float = 0.8, lambda_p: float, **options: Any
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0, **options)
        self.decay = LpDecay(self, p=p, lambda_p=lambda_p)
