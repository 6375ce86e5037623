"""Bring the weights to a target sparsity: when to decay which weights, when to cut, and holding what is cut.

The target rises cubically over the first share of the steps (Zhu and Gupta 2017, arXiv 1710.01878):
    s(t) = S + (s0 - S) * (1 - t / T)**3
lp: L_p decay acts on the weights under the current s(t) quantile only, its lambda steered so that they
arrive near zero as s(t) rises; at T the smallest S are cut, then the mask is held with no decay. Without a
target all weights decay, and with p < 1 the run ends by settling (SETTLE_SHARE).
gradual: magnitudes are cut to s(t) directly. one-shot: all is cut before step 0.
"""

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpsparse.pruning.select import target_count
from lpsparse.recipe import FinetuneStep
from lpsparse.training.decay import LpDecay, budget_lambda, kill_magnitude

REFRESH = 10  # steps between quantiles
# A weight under the quantile has a share of the run's steps to die in, so selective decay starts at a
# multiple of the budget lambda, which gives a weight all of them; the loop then moves it by at most this
# factor either way.
SELECTIVE = 20.0
MOST_STEERING = 10.0
STEER = 1.15
# Without a target, p < 1 empties a band of magnitudes, but weights on their way through it freeze there as
# the learning rate ends. So the run ends by letting only those fall that are far under w_kill already, at
# full strength.
SETTLE_SHARE = 0.15
SETTLE_EDGE = 0.25  # of w_kill
NEAR_ZERO = 0.05  # of the starting threshold: what lies below this has arrived, as far as a cut can tell


def quantile(weights: Iterable[Tensor], count: int) -> float:
    """The count-th smallest magnitude (count from 1) over all tensors; 0 when count is 0."""
    if count == 0:
        return 0.0
    return float(torch.cat([w.detach().abs().flatten() for w in weights]).kthvalue(count).values)


@torch.no_grad()
def allocate(weights: dict[str, Tensor], count: int, method: str) -> dict[str, int]:
    """How many of `count` zeros each tensor gets; ties by tensor name, then position. Exact in sum.

    global: the smallest magnitudes wherever they are. lamp: the smallest scores w**2 / sum of the squares
    that are not smaller in the same tensor (Lee et al. 2021, arXiv 2010.07611), which never empties a tensor
    whose scale is merely small.
    """
    names = sorted(weights)
    if count == 0 or not names:
        return dict.fromkeys(names, 0)
    scores = [_lamp(weights[name]) if method == "lamp" else weights[name].abs().flatten() for name in names]
    threshold = torch.cat(scores).kthvalue(count).values
    counts = {name: int((score < threshold).sum()) for name, score in zip(names, scores, strict=True)}
    left = count - sum(counts.values())
    for name, score in zip(names, scores, strict=True):
        ties = min(left, int((score == threshold).sum()))
        counts[name] += ties
        left -= ties
    return counts


def _lamp(weight: Tensor) -> Tensor:
    """LAMP scores in float64, one a weight, in the order of `weight`."""
    squares, order = weight.detach().flatten().double().square().sort(stable=True)
    rest = squares.flip(0).cumsum(0).flip(0)  # of itself and all that follow
    scores = torch.empty_like(squares)
    scores[order] = squares / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return scores


@torch.no_grad()
def smallest_masks(weights: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Tensor]:
    """True where a weight is kept: all but the `counts`
    smallest magnitudes of each tensor, ties by position."""
    masks: dict[str, Tensor] = {}
    for name, weight in weights.items():
        keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        keep[weight.abs().flatten().sort(stable=True).indices[: counts[name]]] = False
        masks[name] = keep.view(weight.shape)
    return masks


class SparsityControl:
    """Drives one run. Call `before_step`, then the optimizer,
    then `after_step`, once for each optimizer step."""

    def __init__(
        self,
        step: FinetuneStep,
        weights: dict[str, Tensor],
        optimizer: Optimizer,
        learning_rates: list[float],
    ) -> None:
        self.step, self.weights, self.optimizer = step, weights, optimizer
        self.size = sum(w.numel() for w in weights.values())
        self.start = sum(int((w == 0).sum()) for w in weights.values())
        self.target = step.target_sparsity
        self.rates = learning_rates
        total = len(learning_rates)
        self.cut_at = max(1, min(total, round(self._decay_share() * total)))  # the end of ordinary decay
        self.warmup = max(1, round(step.warmup * total))
        self.sum_lr = sum(learning_rates[: self.cut_at])
        self.masks: dict[str, Tensor] = {}
        self.steering = 1.0
        self.decay: LpDecay | None = None
        self.lambda_p = 0.0
        self.threshold = 0.0  # |w| under this is being decayed, in the tensor where it is highest
        # The magnitudes at which each tensor would be cut now; without a target, at half of what is not zero.
        half = self.start + (self.size - self.start) // 2
        self.aim = self._edges(max(1, half if self.target is None else self._count(self.target)))
        if step.method == "lp":
            self.base_lambda = self._base_lambda()
            self.decay = LpDecay(optimizer, p=step.p, lambda_p=0.0, params=weights.values())
        if step.keep_zeros:
            self.masks = {name: w != 0 for name, w in weights.items()}
        if step.method == "one-shot":
            self._cut(self._count(self.target or Decimal(0)))

    def _decay_share(self) -> float:
        if self.target is not None:
            return self.step.decay_share
        return 1 - SETTLE_SHARE if self.step.p < 1 else 1.0

    @property
    def w_kill(self) -> float:
        """Magnitude below which a weight that the loss does not hold dies in this run; 0 without decay."""
        if self.decay is None or self.step.p >= 2 or self.base_lambda == 0:
            return 0.0
        return kill_magnitude(self.step.p, self.base_lambda, self.sum_lr)

    def _edges(self, count: int) -> dict[str, float]:
        """The magnitude under which each tensor has its share of `count` weights; 0 where that is none."""
        counts = allocate(self.weights, count, self.step.allocation)
        return {name: quantile([weight], counts[name]) for name, weight in self.weights.items()}

    def _base_lambda(self) -> float:
        step = self.step
        if step.lambda_p == "auto":
            if step.p >= 2:
                return 0.01  # no weight dies at p >= 2, so there is no budget to meet: a usual weight decay
            # An untouched weight is asked to die at the target's quantile, or without a target at the median.
            magnitude = max(self.aim.values())
            budget = budget_lambda(step.p, magnitude, self.sum_lr) if magnitude > 0 else 0.0
            return budget * (SELECTIVE if self.target is not None else 1.0)
        return step.lambda_p * (step.p if step.lambda_convention == "authors" else 1.0)

    def _count(self, sparsity: Decimal) -> int:
        return target_count(sparsity, self.size, self.start)

    def _scheduled(self, t: int) -> int:
        """Zeros asked for after t steps: the cubic rise, exact at its end."""
        if self.target is None:
            return self.start
        if t >= self.cut_at:
            return self._count(self.target)
        begin, end = self.start / self.size, float(self.target)
        return self._count(Decimal(end + (begin - end) * (1 - t / self.cut_at) ** 3))

    def before_step(self, t: int) -> None:
        """Set lambda and the decayed quantile for step t (from 0)."""
        if self.decay is None:
            return
        if self.target is not None and t >= self.cut_at:
            self.lambda_p = 0.0
        elif t >= self.cut_at:
            self.threshold = SETTLE_EDGE * self.w_kill
            self.decay.below = {id(weight): self.threshold for weight in self.weights.values()}
            self.lambda_p = self.base_lambda * max(self.rates) / max(self.rates[t], 1e-9 * max(self.rates))
        else:
            if self.target is not None and t % REFRESH == 0:
                self._steer(t)
            self.lambda_p = self.base_lambda * self.steering * min(1.0, (t + 1) / self.warmup)
        self.decay.set_lambda(self.lambda_p)

    def _steer(self, t: int) -> None:
        assert self.decay is not None
        edges = self._edges(self._scheduled(t + REFRESH))
        self.threshold = max(edges.values())
        self.decay.below = {id(self.weights[name]): edge for name, edge in edges.items()}
        arrived = self.near_zero()
        wanted = self._scheduled(max(0, t - REFRESH)) / self.size
        if t >= self.warmup and self.step.lambda_p == "auto":
            self.steering *= STEER if arrived < wanted else 1 / STEER
            self.steering = min(MOST_STEERING, max(1 / MOST_STEERING, self.steering))

    @torch.no_grad()
    def near_zero(self) -> float:
        """Fraction of the prunable weights that are as good as zero."""
        arrived = ((w.abs() <= NEAR_ZERO * self.aim[name]).sum() for name, w in self.weights.items())
        return sum(int(count) for count in arrived) / max(1, self.size)

    @torch.no_grad()
    def zeros(self) -> int:
        return sum(int((w == 0).sum()) for w in self.weights.values())

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """So that clipping and momentum see only weights that live."""
        for name, keep in self.masks.items():
            grad = self.weights[name].grad
            if grad is not None:
                grad.masked_fill_(~keep, 0.0)

    @torch.no_grad()
    def after_step(self, t: int) -> None:
        """Cut where the plan says so after step t, and hold every zero that was cut."""
        done = t + 1
        if (
            self.step.method == "gradual"
            and done <= self.cut_at
            and (done % REFRESH == 0 or done == self.cut_at)
        ):
            self._cut(self._scheduled(done))
        elif self.step.method == "lp" and self.target is not None and done == self.cut_at:
            self._cut(self._count(self.target))
        else:
            self._hold()

    def _cut(self, count: int) -> None:
        held = sum(int((~keep).sum()) for keep in self.masks.values())
        self._hold()
        counts = allocate(self.weights, max(count, held), self.step.allocation)
        self.masks = smallest_masks(self.weights, counts)
        self._hold()
        for name, keep in self.masks.items():
            state: dict[str, Any] = self.optimizer.state.get(self.weights[name], {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == keep.shape:
                    value.masked_fill_(~keep, 0.0)

    @torch.no_grad()
    def _hold(self) -> None:
        for name, keep in self.masks.items():
            self.weights[name].masked_fill_(~keep, 0.0)
