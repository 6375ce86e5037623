"""Updates of one size in every layer: the atom norms of Modula, Large et al. 2024, arXiv 2405.14813.

    dW <- dW * lr * sqrt(out / in) / sigma(dW)              linear
    dW <- dW * lr * sqrt(out / in) / (taps * sigma(dW))     convolution, `taps` the size of the kernel

It normalises the *update*, whatever the base optimizer made, and leaves the weights alone, so one lambda
and one learning rate act alike in layers of every scale. Differs from the paper: all weights share one
mass, so that the learning rate is the size of each update in its own norm instead of being divided among
layers; sigma of a convolution is that of the (out, in * kernel) matrix.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpsparse.training.attached import Attached
from lpsparse.training.conditioning.base import Conditioned, Conditioning
from lpsparse.training.conditioning.spectral import PowerIteration

_ITERATIONS = 2  # a step; an update turns faster than a weight does


class Modular(Conditioning):
    def attach(self, optimizer: Optimizer) -> None:
        self._check_held(optimizer)
        self._old: dict[str, Tensor] = {}
        self._power: dict[str, PowerIteration] = {}
        self._optimizer = optimizer
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self.handles.append(Attached(optimizer, "conditioning", handles))

    def _rates(self) -> dict[int, float]:
        """Learning rate by id of the parameter, now: loading a state makes new groups."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return {id(param): float(group["lr"]) for group in groups for param in group["params"]}

    @torch.no_grad()
    def _before(self) -> None:
        self._old = {name: item.weight.detach().clone() for name, item in self.weights.items()}

    @torch.no_grad()
    def _after(self) -> None:
        rates = self._rates()
        for name, item in self.weights.items():
            update = item.rows(item.weight.detach() - self._old.pop(name))
            if not update.any():
                continue
            if name not in self._power:
                self._power[name] = PowerIteration(update)
            sigma = self._power[name].sigma(update, _ITERATIONS).clamp(min=torch.finfo(update.dtype).tiny)
            wanted = rates[id(item.weight)] * atom_scale(item)
            old = item.rows() - update
            item.weight.copy_(item.unrows(old + update * (wanted / sigma)))

    def state_dict(self) -> dict[str, Any]:
        return {"power": {name: each.state_dict() for name, each in self._power.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, vectors in state["power"].items():
            self._power[name] = PowerIteration(self.weights[name].rows())
            self._power[name].load_state_dict(vectors)


def atom_scale(item: Conditioned) -> float:
    """sqrt(out / in) / taps: the size in the spectral norm of an update of size 1 in the atom's norm."""
    outputs, rest = item.rows().shape
    taps = math.prod(item.weight.shape[2:]) if item.axis != -2 else 1
    return math.sqrt(outputs / (rest / taps)) / taps
