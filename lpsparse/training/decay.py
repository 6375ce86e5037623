"""Decoupled L_p weight decay (pWD): Outmezguine and Levi 2024, arXiv 2404.10824, the "adiabatic" update.

    w_next = v / D,   D = 1 + a * (q * |w|**(p - 2) + l2)

w is the weight before the optimizer's step, v after it (its own weight decay 0), a the learning rate, q =
lambda_p, l2 an elastic net's ridge (0: the paper's update). Differs from the paper's code: q is ours, p
times their lambda (so that p = 2 is AdamW's weight decay to first order); theirs is written v * X / (X + a
* q) with X = |w|**(2 - p), which is NaN for w = 0 without decay and overflows for large w; magnitudes
below 1e-30 become +0, so that CPU and GPU agree whatever they do with denormals.

Options, each of which is the paper's update when off: spared weights (selective decay); cautious (only
where the step itself moves the weight towards zero: Chen et al. 2025, arXiv 2510.12402); prox "irl1", the
reweighted L1 step sign(v) * max(|v| - a * q * |w|**(p - 1), 0) (Nakhleh and Nowak 2025), which has the
same fixed points and reaches exact zero in finitely many steps; p = 1 of it is the ordinary L1 prox.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from lpsparse.errors import UsageError
from lpsparse.parallel import ranks
from lpsparse.training.attached import Attached, Closure, Given, uncover, with_closure, with_hooks
from lpsparse.training.compiled import FLUSH, compiled

PROXES = ("pwd", "irl1")
_SETTINGS = ("lp_p", "lp_lambda", "lp_l2", "lp_convention")  # keys in the optimizer's param_groups
CONVENTION = "ours"  # penalty (lambda_p / p) * ||w||_p^p; the authors' code means lambda * ||w||_p^p
_CHUNK = 1 << 17  # elements; what a step reads twice stays in the cache
_WORTH = 1 << 22  # parameters from which on some seconds of compiling are worth it


def lp_divisor(
    w: Tensor, lr: float, p: float, lambda_p: float, lambda_2: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """D in [1, inf] of one step from the old weights `w`; any shape, float32 or float64. inf at w = 0, p <
    2."""
    q, ridge = lr * lambda_p, lr * lambda_2
    power = torch.empty_like(w) if out is None else out
    if p == 2 or q == 0:
        return power.fill_(1 + ridge + q)
    torch.abs(w, out=power)
    if w.device.type == "cpu":
        _power_(power.numpy(), p - 2)
    else:
        power.pow_(p - 2)
    return power.mul_(q).add_(1 + ridge)


def _power_(size: NDArray[Any], exponent: float) -> None:
    """size**exponent in place; numpy's calls take half the time of one torch.pow on a CPU."""
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        np.log2(size, out=size)
        np.multiply(size, size.dtype.type(exponent), out=size)
        np.exp2(size, out=size)


def lp_(
    v: Tensor,
    w: Tensor,
    *,
    lr: float,
    p: float,
    lambda_p: float,
    lambda_2: float = 0.0,
    prox: str = "pwd",
    cautious: bool = False,
    spare: Tensor | None = None,
) -> Tensor:
    """Decay `v` in place by the old weights `w`, except where `spare` is True.

    With lr or both lambdas 0, `v` is left as it is, bit for bit. An exact zero of `w` gives an exact zero
    for p < 2.
    """
    if lr == 0 or (lambda_p == 0 and lambda_2 == 0):
        return v
    left = v.clone() if prox == "irl1" else v
    if prox == "irl1":
        v.copy_(soft_threshold(v / (1 + lr * lambda_2), w, lr * lambda_p, p))
        divisor = None
    else:
        divisor = lp_divisor(w, lr, p, lambda_p, lambda_2)
    off = None if not cautious else (w - left) * w < 0  # the step grows the weight: nothing to agree with
    if spare is not None:
        off = spare if off is None else off | spare
    if divisor is None:
        return v if off is None else v.copy_(torch.where(off, left, v))
    if off is not None:
        divisor.masked_fill_(off, 1.0)
    return divide_(v, divisor)


def divide_(v: Tensor, divisor: Tensor) -> Tensor:
    """v / divisor in place, what is left below FLUSH being +0."""
    v.div_(divisor)
    return torch.hardshrink(v, FLUSH, out=v)


def soft_threshold(v: Tensor, w: Tensor, q: float, p: float) -> Tensor:
    """sign(v) * max(|v| - q * |w|**(p - 1), 0), below FLUSH +0; for p < 1 an exact zero of `w` stays zero."""
    if q == 0:
        return v
    return functional.hardshrink(v.sign() * (v.abs() - q * w.abs().pow(p - 1)).clamp_(min=0.0), FLUSH)


def kill_magnitude(p: float, lambda_p: float, sum_lr: float) -> float:
    """w_kill: every weight that the loss does not hold dies below this over a run. p < 2. (math: budget)"""
    return ((2 - p) * lambda_p * sum_lr) ** (1 / (2 - p))


def budget_lambda(p: float, magnitude: float, sum_lr: float) -> float:
    """The lambda_p whose w_kill is `magnitude` over a run whose learning rates add up to `sum_lr`."""
    return magnitude ** (2 - p) / ((2 - p) * sum_lr)


class LpDecay:
    """Decoupled L_p weight decay for any torch optimizer,
    attached by step hooks: go on calling optimizer.step().

    `params` are the tensors to decay; by default all of 2 or more dimensions, those of groups that are added
    later too. p, lambda_p, lambda_2 and the convention live in the optimizer's param_groups (`lp_p`,
    `lp_lambda`, `lp_l2`), hence in its state dict. Runs once per real step, with a closure or without, so a
    step that a loss scaler skips decays nothing; a tensor that is frozen or has no gradient is left alone; a
    tied tensor decays once. The optimizer refuses to be copied until `remove`. `spare` (id of a tensor ->
    True where a weight is not decayed) may be set between steps. `compile`: make compiled loops of it, by
    default for 4 M weights and more. Costs one float a decayed weight during the step. Raises UsageError for
    p <= 0, a negative lambda, an unknown prox, for bf16/fp16 parameters, which would swallow the decay, and
    for complex ones.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        p: float = 0.5,
        lambda_p: float,
        lambda_2: float = 0.0,
        prox: str = "pwd",
        cautious: bool = False,
        params: Iterable[Tensor] | None = None,
        compile: bool | None = None,
    ) -> None:
        check_settings(p, lambda_p, lambda_2, prox)
        optimizer = with_hooks(optimizer)
        self.optimizer, self.prox, self.cautious = optimizer, prox, cautious
        self.spare: dict[int, Tensor] = {}
        self._ids = None if params is None else {id(param) for param in params}
        self._kept: dict[
            int, Tensor
        ] = {}  # the divisor of a step, or the old weights where that is not enough
        settings: dict[str, Any] = dict(zip(_SETTINGS, (p, lambda_p, lambda_2, CONVENTION), strict=True))
        optimizer.defaults.update(settings)  # of groups that are added later
        for group in optimizer.param_groups:
            group.update(settings)
            for param in group["params"]:
                if self._is_chosen(param):
                    check_precision(param)
        size = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
        self.compile = size >= _WORTH if compile is None else compile
        handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(loading),
        ]
        self._attached = Attached(optimizer, "LpDecay", handles)

    def _is_chosen(self, param: Tensor) -> bool:
        return param.ndim >= 2 if self._ids is None else id(param) in self._ids

    def set_lambda(self, lambda_p: float) -> None:
        for group in (self.optimizer.defaults, *self.optimizer.param_groups):
            group["lp_lambda"] = lambda_p

    def set_p(self, p: float) -> None:
        for group in (self.optimizer.defaults, *self.optimizer.param_groups):
            group["lp_p"] = p

    def remove(self) -> None:
        """Detach from the optimizer."""
        self._attached.remove()
        self._kept.clear()

    def _decayed(self) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            if group["lr"] and (group.get("lp_lambda") or group.get("lp_l2")):
                for param in group["params"]:
                    if param.requires_grad and self._is_chosen(param):
                        yield param, group

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Given | None:
        self._note()
        return with_closure(args, kwargs, self._noting)

    def _noting(self, closure: Closure) -> Closure:
        """Conditioning puts weights back in a closure's forward pass, and these decay, as in a loop without
        closures. Where the optimizer has moved them before (SAM, LBFGS), those of the step's start do."""
        start = self._versions()

        def noted() -> Any:
            is_first = self._versions() == start
            value = closure()
            if is_first and self._versions() != start:
                self._note()
            return value

        return noted

    def _versions(self) -> list[int]:
        return [param._version for param, _ in self._decayed()]

    @torch.no_grad()
    def _note(self) -> None:
        """Keep what the decay is to know of the weights before they move."""
        self._kept.clear()
        uncover(self.optimizer)
        shared: dict[tuple[int, torch.device], Tensor] = {}  # the scalars of this step, moved once
        for param, group in self._decayed():
            check_precision(param)
            w, spare = ranks.local_tensor(param.detach()), self.spare.get(id(param))
            kept = torch.empty_like(w)
            name = "fill" if spare is None else "fill unspared"
            if self._needs_old():
                kept.copy_(w)
            elif (fill := self._kernel(name, w, group["lp_p"])) is not None:
                key = (id(group), param.device)
                shared[key] = shared[key] if key in shared else _scalars(group, param.device)
                given = [kept, w, *([] if spare is None else [spare.view(torch.uint8)])]
                fill(*(each.view(-1) for each in given), shared[key])
            else:
                _chunked(self._divisor(group), kept, w, spare)
            self._kept[id(param)] = kept

    def _kernel(self, name: str, param: Tensor, p: float = 0.0) -> Callable[..., None] | None:
        return compiled(name, param, p) if self.compile else None

    def _needs_old(self) -> bool:
        return self.cautious or self.prox != "pwd"

    def _divisor(self, group: dict[str, Any]) -> Callable[..., None]:
        a, p, q, ridge = float(group["lr"]), group["lp_p"], group["lp_lambda"], group["lp_l2"]

        def write(kept: Tensor, w: Tensor, spare: Tensor | None) -> None:
            lp_divisor(w, a, p, q, ridge, out=kept)
            if spare is not None:
                kept.masked_fill_(spare, 1.0)

        return write

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        overflow: Any = getattr(
            optimizer, "found_inf", None
        )  # a fused optimizer leaves the skipping to itself
        if overflow is not None and float(overflow):
            self._kept.clear()
            return
        for param, group in self._decayed():
            kept = self._kept.pop(id(param), None)
            if kept is None or param.grad is None:
                continue
            v = ranks.local_tensor(param.detach())
            if self._needs_old():
                lp_(
                    v,
                    kept,
                    lr=float(group["lr"]),
                    p=group["lp_p"],
                    lambda_p=group["lp_lambda"],
                    lambda_2=group["lp_l2"],
                    prox=self.prox,
                    cautious=self.cautious,
                    spare=self.spare.get(id(param)),
                )
            elif (divide := self._kernel("divide", v)) is not None:
                divide(v.view(-1), kept.view(-1))
            else:
                _chunked(divide_, v, kept)


def loading(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state to load, with the settings of the decay where it was saved without them. Another p warns."""
    groups: list[dict[str, Any]] = []
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        groups.append({key: group[key] for key in _SETTINGS if key in group} | saved)
        if saved.get("lp_p", group.get("lp_p")) != group.get("lp_p"):
            text = f"state was saved with p = {saved['lp_p']}, this decay was made with p = {group['lp_p']}"
            warnings.warn(f"{text}; the saved one is used", stacklevel=3)
    groups += state["param_groups"][len(groups) :]  # too many: torch says so
    return {**state, "param_groups": groups}


def check_settings(p: float, lambda_p: float, lambda_2: float = 0.0, prox: str = "pwd") -> None:
    if not p > 0 or not lambda_p >= 0 or not lambda_2 >= 0:
        what = f"p = {p}, lambda_p = {lambda_p}, lambda_2 = {lambda_2}: p > 0, lambdas >= 0"
        raise UsageError(220, what, hint="give p above 0 and a lambda of 0 or more")
    if prox not in PROXES:
        raise UsageError(226, f"prox {prox!r}: not known", hint=f"one of {', '.join(PROXES)}")


def check_precision(param: Tensor) -> None:
    if param.is_complex():
        what = f"a {param.dtype} parameter of shape {tuple(param.shape)}: L_p decay is of real weights"
        raise UsageError(239, what, hint="give those to decay: LpDecay(optimizer, params=...)")
    if param.dtype in (torch.float16, torch.bfloat16):
        what = f"a {param.dtype} parameter of shape {tuple(param.shape)} underflows: L_p decay needs float32"
        raise UsageError(221, what, hint="keep float32 parameters and use autocast")


def _scalars(group: dict[str, Any], device: torch.device) -> Tensor:
    a = float(group["lr"])
    values = (group["lp_p"] - 2, a * group["lp_lambda"], 1 + a * group["lp_l2"])
    return torch.tensor(values, dtype=torch.float32, device=device)


def _chunked(function: Callable[..., Any], *tensors: Tensor | None) -> None:
    """Call on flat pieces that fit the cache; on a GPU, or where a tensor has no flat view, on the whole."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in given):
        function(*tensors)
        return
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for first in range(0, given[0].numel(), _CHUNK):
        function(*(None if each is None else each[first : first + _CHUNK] for each in flat))
