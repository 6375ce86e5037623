"""Cost of the optimizer's step: torch's fused AdamW against LpAdamW and LpDecay's hooks, side by side.

Run by `python benchmarks/training.py step`. Prints ratios of medians over rounds in which every optimizer
steps in turn on the same tensors' shapes (those of MiniLM's encoder), the peak of the memory that a step
takes beside weights, gradients and averages, and the ratio of whole training steps of MiniLM.
"""

import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROUNDS = 25
WARM, STEPS = 12, 20  # whole training steps; the decay phase begins at step 10


def shapes() -> list[tuple[int, ...]]:
    """all-MiniLM-L6-v2: six layers of 10.6 M weights in 36 matrices, their biases and norms, and the
    embeddings."""
    layer = [(384, 384)] * 4 + [(1536, 384), (384, 1536)] + [(384,)] * 9 + [(1536,)]
    return [(30522, 384), (512, 384), (2, 384), (384,), (384,), *layer * 6]


def parameters(device: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(0.05 * torch.randn(shape, device=device)) for shape in shapes()]
    for param in made:
        param.grad = 1e-3 * torch.randn_like(param)
    return made


def optimizers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    import lpsparse

    def plain(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)

    def hooks(params: list[nn.Parameter], p: float, compile: bool) -> torch.optim.Optimizer:
        optimizer = plain(params)
        lpsparse.LpDecay(optimizer, p=p, lambda_p=1e-3, compile=compile)
        return optimizer

    def one(params: list[nn.Parameter], p: float, one_pass: bool = True) -> torch.optim.Optimizer:
        return lpsparse.LpAdamW(params, lr=1e-4, p=p, lambda_p=1e-3, one_pass=one_pass)

    def authors(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return AuthorsWay(plain(params))  # pyright: ignore[reportReturnType]

    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {"fused AdamW": plain}
    for p in (0.5, 0.8):
        made[f"LpAdamW, p = {p}"] = partial(one, p=p)
        made[f"LpDecay hooks on fused AdamW, p = {p}"] = partial(hooks, p=p, compile=True)
        made[f"the same without a compiler, p = {p}"] = partial(hooks, p=p, compile=False)
    made["LpAdamW without a compiler, p = 0.8"] = partial(one, p=0.8, one_pass=False)
    return made | {"the formula tensor by tensor, p = 0.8": authors}


class AuthorsWay:
    """Old weights kept, then v * |w|**(2-p) / (|w|**(2-p) + a * q), one torch call at a time."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @torch.no_grad()
    def step(self) -> None:
        params = [param for param in self.inner.param_groups[0]["params"] if param.ndim >= 2]
        old = [param.clone() for param in params]
        self.inner.step()
        for param, w in zip(params, old, strict=True):
            power = w.abs() ** 1.2
            param.mul_(power / (power + 1e-7))


def step_times(device: str) -> dict[str, float]:
    made = {name: make(parameters(device)) for name, make in optimizers().items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(ROUNDS + 3):
        for name, optimizer in made.items():
            synchronize(device)
            began = time.perf_counter()
            optimizer.step()
            synchronize(device)
            if turn >= 3:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(name: str, device: str) -> float:
    """MB that a fresh process grows by in three steps beyond weights, gradients and averages."""
    code = f"import optimizer_step as o; print(o.grown({name!r}, {device!r}))"
    where = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def grown(name: str, device: str) -> float:
    params = parameters(device)
    optimizer = optimizers()[name](params)
    optimizer.step()  # makes the averages, and compiles
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts here
    before = resident("VmRSS")
    for _ in range(3):
        optimizer.step()
    return (resident("VmHWM") - before) / 1e3


def resident(key: str) -> int:
    """kB, from /proc/self/status; the whole process's peak where that is missing."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


def training_times(model: Path, device: str) -> dict[str, float]:
    """Seconds of a whole step of MiniLM (32 sentences of 32 tokens), means in turn: the plain loop, and the
    default's, which covers and decays in every step and chooses what goes in every tenth, also with rows."""
    from transformers import AutoModelForSequenceClassification

    import lpsparse
    from lpsparse.steps.finetune import FinetuneStep
    from lpsparse.steps.resolve import resolve
    from lpsparse.training.control import SparsityControl
    from lpsparse.training.schedule import plan_phases

    runs: dict[str, Callable[..., None]] = {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (32, 32), generator=generator).to(device)
    ways = (
        ("AdamW", ""),
        ("the default in its decay phase", "none"),
        ("the same with --condition rows", "rows"),
    )
    for name, way in ways:
        network: Any = AutoModelForSequenceClassification.from_pretrained(model).to(device).train()
        named = dict(network.named_parameters())
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        control = None
        if way:
            weights = {key: param for key, param in named.items() if "encoder" in key and param.ndim == 2}
            if way == "rows":
                lpsparse.condition(network, way, weights)
            given = {"model": "", "out": "", "data": "", "task": "text-classification", "score": "fisher"}
            step = resolve(FinetuneStep, {**given, "target_sparsity": 0.8, "lr": 1e-5})
            control = SparsityControl(step, weights, optimizer, plan_phases(step, 10 * STEPS))
            control.begin()

        def run(t: int, control: Any = control, network: Any = network, optimizer: Any = optimizer) -> None:
            if control is not None:
                control.before_step(t)
            network(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
            if control is not None:
                control.after_backward(t)
            optimizer.step()
            optimizer.zero_grad()
            if control is not None:
                control.after_step(t)
            synchronize(device)

        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for t in range(WARM + STEPS):
        for name, run in runs.items():
            began = time.perf_counter()
            run(t)
            if t >= WARM:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.mean(each) for name, each in times.items()}


def main(model: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    times = step_times(device)
    base = times["fused AdamW"]
    size = sum(map(math.prod, shapes()))
    print(f"| optimizer step, {size:,} weights, {device}, one thread | ratio | ms | extra MB |")
    print("|---|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / base:.2f} | {1e3 * seconds:.1f} | {peak_of(name, device):.0f} |")
    whole = training_times(model, device)
    print("\n| whole training step of MiniLM | ratio | ms |\n|---|---|---|")
    for name, seconds in whole.items():
        print(f"| {name} | {seconds / whole['AdamW']:.3f} | {1e3 * seconds:.0f} |")
