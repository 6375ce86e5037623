"""RigL: exchange the smallest living weights for those with the largest gradient (Evci et al. 2020, arXiv
1911.11134, algorithm 1).

Every so often, of each tensor, the share a / 2 * (1 + cos(pi * t / T)) of its living weights with the
smallest magnitudes dies, and as many of the dead with the largest |gradient| live again, from zero
(one that had just died keeps its value). T is
75 % of the run, a = 0.3, as there. Differs: an exchange every fortieth of the run instead of every 100
steps of a long one, and the step goes on after it.
"""

import math
from typing import TYPE_CHECKING

from lpsparse.training.methods.one_shot import OneShot

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 0.3
END = 0.75
EXCHANGES = 40


class Rigl(OneShot):
    words = "RigL"
    shards = False

    def exchanges(self, t: int) -> bool:
        return is_due(t, self.control.phases.steps)

    def after_backward(self, t: int) -> None:
        if self.exchanges(t):
            control = self.control
            control.masks = regrow(control.weights, control.masks, t, control.phases.steps)
            control.hold()
            control.forget()


def is_due(t: int, steps: int) -> bool:
    every = max(1, steps // EXCHANGES)
    return t > 0 and t % every == 0 and t < END * steps


def regrow(
    weights: "dict[str, Tensor]", masks: "dict[str, Tensor]", t: int, steps: int
) -> "dict[str, Tensor]":
    """The new masks, each with as many living weights as before. Gradients must be those of a dense model."""
    share = SHARE / 2 * (1 + math.cos(math.pi * t / (END * steps)))
    after: dict[str, Tensor] = {}
    for name, keep in masks.items():
        grad, alive = weights[name].grad, keep.flatten()
        moved = min(int(share * int(alive.sum())), int((~alive).sum()))
        if grad is None or moved == 0:
            after[name] = keep
            continue
        size = weights[name].detach().abs().flatten().masked_fill(~alive, math.inf)
        dropped = size.topk(moved, largest=False).indices
        alive = alive.clone()
        alive[dropped] = False
        slope = grad.abs().flatten().masked_fill(alive, -1.0)
        alive[slope.topk(moved).indices] = True
        after[name] = alive.view(keep.shape)
    return after
