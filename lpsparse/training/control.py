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
# Without a target, p < 1 empties a band of magnitudes, but weights on their way through it freeze there as the
# learning rate ends. So the run ends by letting only those fall that are far under w_kill already, at full
# strength.
SETTLE_SHARE = 0.15
SETTLE_EDGE = 0.25  # of w_kill
NEAR_ZERO = 0.05  # of the starting threshold: what lies below this has arrived, as far as a cut can tell


def quantile(weights: Iterable[Tensor], count: int) -> float:
    """The count-th smallest magnitude (count from 1) over all tensors; 0 when count is 0."""
    if count == 0:
        return 0.0
    return float(torch.cat([w.detach().abs().flatten() for w in weights]).kthvalue(count).values)


@torch.no_grad()
def smallest_masks(weights: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """True where a weight is kept, all but the `count` smallest magnitudes; ties by tensor name, then
    position."""
    threshold = quantile(weights.values(), count)
    left = count - sum(int((w.abs() < threshold).sum()) for w in weights.values())
    masks: dict[str, Tensor] = {}
    for name in sorted(weights):
        size = weights[name].abs()
        cut = size < threshold
        ties = (
            (size == threshold).flatten().nonzero().flatten()[:left]
            if count
            else cut.new_zeros(0, dtype=torch.long)
        )
        cut.view(-1)[ties] = True
        left -= len(ties)
        masks[name] = ~cut
    return masks


class SparsityControl:
    """Drives one run. Call `before_step`, then the optimizer, then `after_step`, once for each optimizer
    step."""

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
        self.threshold = 0.0  # |w| under this is being decayed
        self.aim = quantile(weights.values(), max(1, self._count(self.target or Decimal("0.5"))))
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

    def _base_lambda(self) -> float:
        step = self.step
        if step.lambda_p == "auto":
            if step.p >= 2:
                return 0.01  # no weight dies at p >= 2, so there is no budget to meet: a usual weight decay
            # An untouched weight is asked to die at the target's quantile, or without a target at the median.
            budget = budget_lambda(step.p, self.aim, self.sum_lr) if self.aim > 0 else 0.0
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
            self.decay.below = self.threshold = SETTLE_EDGE * self.w_kill
            self.lambda_p = self.base_lambda * max(self.rates) / max(self.rates[t], 1e-9 * max(self.rates))
        else:
            if self.target is not None and t % REFRESH == 0:
                self._steer(t)
            self.lambda_p = self.base_lambda * self.steering * min(1.0, (t + 1) / self.warmup)
        self.decay.set_lambda(self.lambda_p)

    def _steer(self, t: int) -> None:
        assert self.decay is not None
        self.threshold = quantile(self.weights.values(), self._scheduled(t + REFRESH))
        self.decay.below = self.threshold
        arrived = self.near_zero()
        wanted = self._scheduled(max(0, t - REFRESH)) / self.size
        if t >= self.warmup and self.step.lambda_p == "auto":
            self.steering *= STEER if arrived < wanted else 1 / STEER
            self.steering = min(MOST_STEERING, max(1 / MOST_STEERING, self.steering))

    @torch.no_grad()
    def near_zero(self) -> float:
        """Fraction of the prunable weights that are as good as zero."""
        edge = NEAR_ZERO * self.aim
        return sum(int((w.abs() <= edge).sum()) for w in self.weights.values()) / self.size

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
        self.masks = smallest_masks(self.weights, max(count, held))
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
