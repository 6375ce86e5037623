"""Decay as compiled loops: one pass over memory each (C++ on a CPU, Triton on a GPU, by torch.compile).

All work in place on flat float32 tensors of two elements or more; numbers that change from step to step come
in a small tensor, so that nothing is compiled twice.
"""

import shutil
import warnings
from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from lpsparse.borrowed import borrow

FLUSH = 1e-30  # smaller magnitudes become +0


def lp_adamw_(
    w: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, *, halves: int = 0
) -> None:
    """One step, in place, on flat tensors, p < 2. `scalars`: 1 - beta1, 1 - beta2, lr / (1 - beta1**t),
    1 / sqrt(1 - beta2**t), eps, p - 2, lr * lambda_p. `halves`: see `power`."""
    size = w.abs()
    decayed = 1 + scalars[6] * power(size, scalars[5], halves)
    exp_avg.copy_(exp_avg + (grad - exp_avg) * scalars[0])
    exp_avg_sq.copy_(exp_avg_sq + (grad * grad - exp_avg_sq) * scalars[1])
    spread = exp_avg_sq.sqrt() * scalars[3] + scalars[4]
    # (w - a * m / spread) / D, with one division: divisions and the power are what this loop waits for
    v = (w * spread - scalars[2] * exp_avg) / (spread * decayed)
    w.copy_(torch.where((v.abs() < FLUSH) | (size == 0), 0.0, v))


def fill_divisor_(divisor: Tensor, w: Tensor, scalars: Tensor, *, halves: int = 0) -> None:
    """1 + ridge + q * |w|**(p - 2), inf at 0, p < 2. `scalars`: p - 2, q, 1 + ridge."""
    size = w.abs()
    filled = scalars[2] + scalars[1] * power(size, scalars[0], halves)
    divisor.copy_(torch.where(size == 0, torch.inf, filled))


def fill_unspared_(divisor: Tensor, w: Tensor, spare: Tensor, scalars: Tensor, *, halves: int = 0) -> None:
    """The same, but 1 where `spare` (uint8: loops over bool are not vectorized) is 1."""
    fill_divisor_(divisor, w, scalars, halves=halves)
    divisor.copy_(torch.where(spare.to(torch.float32) > 0.5, 1.0, divisor))


def divide_flush_(v: Tensor, divisor: Tensor) -> None:
    """v / divisor, what is left below FLUSH being +0."""
    left = v / divisor
    v.copy_(torch.where(left.abs() < FLUSH, 0.0, left))


def power(size: Tensor, exponent: Tensor, halves: int) -> Tensor:
    """size**exponent. `halves` is twice the exponent where that is -3, -2 or -1 (p = 0.5, 1, 1.5), for which
    a root does; 0 for any other."""
    if halves == -3:
        return 1 / (size * size.sqrt())
    if halves in (-2, -1):
        return 1 / (size if halves == -2 else size.sqrt())
    return fast_power(size, exponent)


def fast_power(size: Tensor, exponent: Tensor) -> Tensor:
    """size**exponent of positive float32, to some 3e-6 of itself: pow takes longer than the rest of a step.

    log2 by the bits of the exponent and the series of atanh on sqrt(1/2)..sqrt(2); exp2 by rounding, a
    polynomial, and an addition to the bits of the exponent.
    """
    bits = size.view(torch.int32)
    whole = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    mantissa = (bits - (whole << 23)).view(torch.float32)
    s = (mantissa - 1) / (mantissa + 1)
    s2 = s * s
    # 2 / ((2k + 1) ln 2)
    series = 2.8853900817779268 + s2 * (0.9617966939259756 + s2 * (0.5770780163555854 + s2 * 0.41219858311))
    scaled = ((whole.to(torch.float32) + s * series) * exponent).clamp(-126, 126)
    shifted = scaled + 12582912.0  # 1.5 * 2**23: no digits after the point are left, so it is rounded
    f = scaled - (shifted - 12582912.0)
    # least squares of the relative error on -1/2..1/2
    high = 0.0555074262 + f * (0.0096754597 + f * 0.0013266970)
    polynomial = 1.0000000710 + f * (0.6931469492 + f * (0.2402212175 + f * high))
    return (polynomial.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


_F32 = torch.float32
_KERNELS: dict[str, tuple[Callable[..., None], tuple[torch.dtype, ...], int]] = {
    # name -> function, its flat tensors, scalars
    "step": (lp_adamw_, (_F32,) * 4, 7),
    "fill": (fill_divisor_, (_F32,) * 2, 3),
    "fill unspared": (fill_unspared_, (_F32, _F32, torch.uint8), 3),
    "divide": (divide_flush_, (_F32,) * 2, 0),
}


def compiled(name: str, like: Tensor, p: float = 0.0) -> Callable[..., None] | None:
    """One of _KERNELS as a compiled loop for flat tensors on the device of `like`, made on the first call,
    some seconds; None for p >= 2, for a `like` that these loops are not for, and where no compiler works."""
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.is_contiguous()
    if p >= 2 or not plain or like.dtype != torch.float32 or like.numel() < 2:
        return None
    return _compiled(name, like.device.type, int(2 * (p - 2)) if 2 * (p - 2) in (-3, -2, -1) else 0)


@cache
@torch.no_grad()  # as in a step, or it would be compiled again there
def _compiled(name: str, device: str, halves: int) -> Callable[..., None] | None:
    if device == "cpu" and not any(shutil.which(each) for each in ("g++", "clang++", "cl")):
        return None
    function, kinds, scalars = _KERNELS[name]
    # A code object of its own: torch counts what it compiled by code object, and gives up after a few.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    own.__kwdefaults__ = {"halves": halves} if scalars else None
    # Of a usual size, and a size that may differ: so the loop is made for many threads and any length.
    mark_dynamic = borrow("torch._dynamo:mark_dynamic")
    kernel = torch.compile(own, fullgraph=True, dynamic=None if mark_dynamic else True)
    given = [torch.ones(1 << 18, dtype=kind, device=device) for kind in kinds]
    for each in given if mark_dynamic else ():
        mark_dynamic(each, 0)
    if scalars:
        given.append(torch.ones(scalars, device=device))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own modules warn of each other
            kernel(*given)
    except Exception as error:  # a compiler that is there and does not work fails in many ways
        text = f"torch.compile does not work here ({type(error).__name__}): decay takes more passes"
        warnings.warn(text, stacklevel=3)
        return None
    return kernel
