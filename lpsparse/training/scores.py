"""What ranks the weights: the smallest scores go first. A score is a record in `lpsparse/families.py`.

magnitude: |w|. fisher: |w| * sqrt(v) with v AdamW's own average of squared gradients, corrected for its
start. The square of the latter is twice the rise of the loss when w is set to zero, in the diagonal
approximation of the curvature by the empirical Fisher information (LeCun et al. 1989, Optimal Brain Damage,
eq. 5; Singh and Alistarh 2020, arXiv 2004.14340), with the curvature for free.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpsparse.errors import UsageError
from lpsparse.parallel import ranks

SETTLED = 10  # steps; before them an average of squared gradients is mostly noise


@dataclass(frozen=True, slots=True)
class Score:
    """`of(weights, optimizer)` gives new tensors, not negative, shaped like this process's parts."""

    of: Callable[[dict[str, Tensor], Optimizer], dict[str, Tensor]]
    words: str  # in a summary
    settles: bool = False  # means nothing in the first SETTLED steps


@torch.no_grad()
def magnitude(weights: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """|w|."""
    return {name: ranks.local_tensor(weight.detach()).abs() for name, weight in weights.items()}


@torch.no_grad()
def fisher(weights: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """|w| * sqrt(v). Raises UsageError for weights that the optimizer has no v for, as no gradient came."""
    betas: dict[int, Any] = {
        id(p): group.get("betas") for group in optimizer.param_groups for p in group["params"]
    }
    scores: dict[str, Tensor] = {}
    blind = [name for name, weight in weights.items() if "exp_avg_sq" not in optimizer.state.get(weight, {})]
    if blind:
        what = f"no gradient has reached {', '.join(blind[:4])}: nothing says what the loss would lose by it"
        raise UsageError(227, what, hint="--exclude it, or use --score magnitude")
    for name, weight in weights.items():
        state: dict[str, Any] = optimizer.state[weight]
        average = ranks.local_tensor(state["exp_avg_sq"]) / (1 - betas[id(weight)][1] ** float(state["step"]))
        size = ranks.local_tensor(weight.detach()).abs()
        scores[name] = average.sqrt_().add_(torch.finfo(weight.dtype).eps ** 2).mul_(size)
    return scores


MAGNITUDE = Score(magnitude, "by magnitude")
FISHER = Score(fisher, "Fisher score", settles=True)
