"""--mixed-precision auto: bf16 where the hardware computes in it, else fp32.

A CPU without bf16 instructions emulates them: right, and many times slower than fp32.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lpsparse.steps.finetune import FinetuneStep

# Names of the instructions, as torch.cpu.get_capabilities and Linux write them: x86, then ARM.
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "arm_bf16", "sve_bf16", "bf16", "svebf16"}
_ROUNDS = 5


def has_bf16() -> bool:
    """Return whether the device that will train computes in bf16 itself."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():  # of the others only Intel's is known to
        return torch.accelerator.current_accelerator() == torch.device("xpu")
    return bool(_instructions() & _INSTRUCTIONS) and "AVX2" not in torch.backends.cpu.get_cpu_capability()


def _instructions() -> set[str]:
    """The instructions of this CPU; empty where neither torch (before 2.12) nor the system lists them."""
    known: Callable[[], dict[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
    if known is not None:
        return {name for name, value in known().items() if value is True}
    if sys.platform != "linux":
        return set()
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    told = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return set(next(told, "").split())


def with_precision(step: FinetuneStep) -> tuple[FinetuneStep, tuple[str, ...]]:
    """`step` with the arithmetic that it will have, and what there is to say of it."""
    if step.mixed_precision == "auto":
        chosen = "bf16" if has_bf16() else "no"
        words = "mixed precision: bf16" if has_bf16() else "fp32: this device does not compute in bf16"
        return step.model_copy(update={"mixed_precision": chosen}), (words,)
    if step.mixed_precision != "bf16" or has_bf16() or torch.accelerator.is_available():
        return step, ()
    words = f"bf16 is emulated on this CPU: a linear layer takes {slowdown():.1f} times as long as in fp32"
    return step, (f"{words} (measured); --mixed-precision auto trains in fp32 here",)


def slowdown() -> float:
    """How many times as long a linear layer takes in bf16 as in fp32, forward and backward, on this CPU.
    Takes a fraction of a second."""
    layer, rows = nn.Linear(512, 512), torch.ones(64, 512)

    def seconds(bf16: bool) -> float:
        started = perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            layer(rows).sum().backward()
        return perf_counter() - started

    for bf16 in (False, True):  # the first time prepares kernels
        seconds(bf16)
    return statistics.median(seconds(True) for _ in range(_ROUNDS)) / statistics.median(
        seconds(False) for _ in range(_ROUNDS)
    )
