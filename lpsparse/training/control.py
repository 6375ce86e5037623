"""Bring the weights to a target sparsity: which weights are to go now, how they go, and holding what is cut.

Phases and the rising target: `phases`. Scores and shares: `allocation`. How weights go, by method: lp: L_p
decay of the weights that the current target would cut (selective decay), its lambda steered so that they
arrive near zero as the target rises; then the target is cut exactly (`cut`: or in parts, as it rises).
l1: the same loop with the L1 prox on all weights. dwf: weights are products of factors (`factors`).
gradual: what the target asks for is cut directly. one-shot: all is cut before step 0. rigl: one-shot, then
the smallest are exchanged for those with the largest gradient (`regrow`). After the cut the mask is held:
in the weights, their gradients and the optimizer's averages.
"""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpsparse.parallel import ranks
from lpsparse.pruning.select import target_count
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.allocation import allocate, fisher, keep_only_, kth_smallest, smallest_masks
from lpsparse.training.attached import own_rate
from lpsparse.training.decay import LpDecay, budget_lambda, kill_magnitude
from lpsparse.training.factors import Factors
from lpsparse.training.phases import Phases
from lpsparse.training.regrow import is_due, regrow

REFRESH = 10  # steps between choices of what is to go
# A weight that is to go has a share of the run's steps to do so, so selective decay starts at a multiple
# of the budget lambda, which gives a weight all of them; the loop then moves it by at most MOST_STEERING
# either way.
SELECTIVE = 20.0
MOST_STEERING = 10.0
STEER = 1.15
SETTLE_EDGE = 0.25  # of w_kill: without a target, what falls in the last steps (see phases)
NEAR_ZERO = 0.05  # of the starting threshold: what lies below this has arrived, as far as a cut can tell


def quantile(weights: Iterable[Tensor], count: int, *, across: bool = False) -> float:
    """The count-th smallest magnitude (count from 1) over all tensors; 0 when count is 0."""
    if count == 0:
        return 0.0
    return float(kth_smallest(torch.cat([w.detach().abs().flatten() for w in weights]), count, across=across))


class SparsityControl:
    """Drives one run. For each optimizer step t (from 0) call `before_step`, then, after the backward pass,
    `after_backward`, then the optimizer, then `after_step`."""

    def __init__(
        self,
        step: FinetuneStep,
        weights: dict[str, Tensor],
        optimizer: Optimizer,
        phases: Phases,
        *,
        others: Mapping[str, Tensor] | None = None,
        top: float | None = None,
    ) -> None:
        """`others` are parameters that are not cut; keep_zeros holds their zeros, too. `top` is the largest
        of the groups' own learning rates (`own_rate`). Raises ValueError while the score is still auto
        (`setup.resolve_auto`)."""
        if step.score == "auto":
            raise ValueError("score auto is not resolved")
        self.step, self.weights, self.optimizer, self.phases = step, weights, optimizer, phases
        self.others, self.top = dict(others or {}), top
        self.across = any(ranks.is_sharded(w) for w in weights.values())
        self.size = sum(w.numel() for w in weights.values())
        self.start = self.zeros()
        self.target = step.target_sparsity
        self.rates = [step.lr * phases.rate(t) for t in range(phases.steps)]
        self.sum_lr = sum(self.rates[: phases.cut_at])
        self.masks: dict[str, Tensor] = {}  # True where a weight lives
        self.spare: dict[str, Tensor] = {}  # True where the current target would keep a weight
        self._covered: dict[str, Tensor] = {}  # values of what is covered now; kept from step to step
        self._is_covered = False
        self.steering = 1.0
        self.p = step.p
        self.decay: LpDecay | None = None
        self.factors: Factors | None = None
        self.lambda_p = 0.0
        # The magnitudes at which each tensor would be cut now; without a target, at half of what is not zero.
        half = self.start + (self.size - self.start) // 2
        self.aim = self._edges(max(1, half if self.target is None else self._count(self.target)))
        if step.method in ("lp", "l1"):
            self._set_decay()
        if step.method == "dwf":
            given = step.lambda_p
            if given != "auto" and step.lambda_convention == "authors":
                given *= 2 / step.factors  # p = 2 / D
            self.factors = Factors(weights, optimizer, step.factors, self.sum_lr, given)
        self.held: dict[str, Tensor] = {}  # as `masks`, of the others
        if step.keep_zeros:
            self.masks = {name: w != 0 for name, w in self._parts().items()}
            living = {name: ranks.local_tensor(w.detach()) != 0 for name, w in self.others.items()}
            self.held = {name: keep for name, keep in living.items() if not keep.all()}
        if step.method in ("one-shot", "rigl"):
            self._cut(self._count(self.target or Decimal(0)))

    def _set_decay(self) -> None:
        prox = "irl1" if self.step.method == "l1" else self.step.prox
        self.p = 1.0 if self.step.method == "l1" else self.step.p
        self.base_lambda = self._base_lambda()
        self.decay = LpDecay(
            self.optimizer,
            p=self.p,
            lambda_p=0.0,
            lambda_2=0.0,
            prox=prox,
            cautious=self.step.cautious,
            params=self.weights.values(),
        )

    @property
    def selective(self) -> bool:
        return self.target is not None and self.step.method == "lp" and self.step.selective

    @property
    def gradual(self) -> bool:
        """Whether the cut is made in parts, as the target rises."""
        return "gradual" in (self.step.method, self.step.cut)

    @property
    def w_kill(self) -> float:
        """Magnitude below which a weight that the loss does not hold dies in this run; 0 without decay."""
        if self.decay is None or self.p >= 2 or self.base_lambda == 0:
            return 0.0
        return kill_magnitude(self.p, self.base_lambda, self.sum_lr)

    def _edges(self, count: int) -> dict[str, float]:
        """The magnitude under which each tensor has its share of `count` weights; 0 where that is none."""
        sizes, across = self._magnitudes(), self.across
        own = allocate(sizes, count, self.step.allocation, across=across)
        counts = dict(zip(sorted(own), self._sums([own[name] for name in sorted(own)]), strict=True))
        return {name: quantile([size], counts[name], across=across) for name, size in sizes.items()}

    def _base_lambda(self) -> float:
        step = self.step
        if step.lambda_p == "auto":
            if self.p >= 2:
                return 0.01  # no weight dies at p >= 2, so there is no budget to meet: a usual weight decay
            # An untouched weight is asked to die at the target's quantile, or without a target at the median.
            magnitude = max(self.aim.values())
            budget = budget_lambda(self.p, magnitude, self.sum_lr) if magnitude > 0 else 0.0
            return budget * (SELECTIVE if self.selective else 1.0)
        return step.lambda_p * (self.p if step.lambda_convention == "authors" else 1.0)

    def _count(self, sparsity: Decimal) -> int:
        return target_count(sparsity, self.size, self.start)

    def scheduled(self, t: int) -> int:
        """Zeros asked for after t steps."""
        if self.target is None:
            return self.start
        if t >= self.phases.cut_at:
            return self._count(self.target)
        begin, end = self.start / self.size, float(self.target)
        return self._count(Decimal(begin + (end - begin) * self.phases.rise(t)))

    def _parts(self) -> dict[str, Tensor]:
        """The values of the weights, as far as this process has them, on the same memory."""
        return {name: ranks.local_tensor(weight.detach()) for name, weight in self.weights.items()}

    def _living(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of which something is held at zero, and True where they live."""
        yield from ((self.weights[name], keep) for name, keep in self.masks.items())
        yield from ((self.others[name], keep) for name, keep in self.held.items())

    def _sums(self, counts: list[int]) -> list[int]:
        """Counts of this process's parts as counts of the whole."""
        return [int(count) for count in ranks.all_reduce_sum(counts)] if self.across else counts

    def _magnitudes(self) -> dict[str, Tensor]:
        return {name: part.abs() for name, part in self._parts().items()}

    def _scores(self) -> dict[str, Tensor]:
        """What ranks the weights now. Raises UsageError where fisher knows nothing of one of them."""
        return fisher(self.weights, self.optimizer) if self.step.score == "fisher" else self._magnitudes()

    @torch.no_grad()
    def _choose(self, count: int) -> dict[str, Tensor]:
        """True where a weight stays when `count` go. What is cut stays cut: its score alone is 0."""
        scores = self._scores()
        for score in scores.values():
            score.clamp_(min=torch.finfo(score.dtype).tiny)
        for name, keep in self.masks.items():
            scores[name].masked_fill_(~keep, 0.0)
        return smallest_masks(scores, allocate(scores, count, self.step.allocation, across=self.across))

    @torch.no_grad()
    def before_step(self, t: int) -> None:
        """Set lambda, p and the decayed weights for step t (from 0); cover what is to go, if asked for."""
        phases = self.phases
        decaying = phases.start <= t < phases.cut_at
        if self.target is not None and decaying and (t - phases.start) % REFRESH == 0:
            self._refresh(t)
        if self.decay is not None:
            self.lambda_p = self._lambda(t) if decaying or self.target is None else 0.0
            self.decay.set_lambda(self.lambda_p)
            for group in self.optimizer.param_groups:
                if self.step.lambda_p == "auto":  # alike in all groups, whatever their learning rates
                    group["lp_lambda"] = self.lambda_p / self._share(group)
                group["lp_l2"] = self.step.lambda_2 if decaying or self.target is None else 0.0
            if self.step.p_start is not None and self.step.method == "lp":
                share = phases.progress(t)
                self.decay.set_p(self.step.p_start + (self.p - self.step.p_start) * share)
        if self.selective and self.step.masked_forward and self.spare and decaying:
            for name, part in self._parts().items():
                if name not in self._covered:
                    self._covered[name] = torch.empty_like(part)
                self._covered[name].copy_(part)
                keep_only_(part, self.spare[name])
            self._is_covered = True

    def _share(self, group: dict[str, Any]) -> float:
        """The group's learning rate as a share of the largest; 1 for one that does not move."""
        return 1.0 if self.top is None else own_rate(group) / self.top or 1.0

    def _lambda(self, t: int) -> float:
        assert self.decay is not None
        if self.target is None and t >= self.phases.cut_at:  # settling
            edge = SETTLE_EDGE * self.w_kill
            parts = self._parts()
            self.decay.spare = {id(self.weights[name]): part.abs() >= edge for name, part in parts.items()}
            return self.base_lambda * max(self.rates) / max(self.rates[t], 1e-9 * max(self.rates))
        return self.base_lambda * self.steering * min(1.0, (t + 1) / self.phases.warmup)

    def _refresh(self, t: int) -> None:
        """Choose what is to go until the next refresh, and steer lambda by what has arrived."""
        if self.decay is None:
            return
        if self.selective:
            self.spare = self._choose(self.scheduled(t + REFRESH))
            self.decay.spare = {id(self.weights[name]): keep for name, keep in self.spare.items()}
        if t > self.phases.start and self.step.lambda_p == "auto" and not self.gradual:
            late = self.near_zero() < self.scheduled(max(0, t - REFRESH)) / self.size
            self.steering *= STEER if late else 1 / STEER
            self.steering = min(MOST_STEERING, max(1 / MOST_STEERING, self.steering))

    @torch.no_grad()
    def after_backward(self, t: int) -> None:
        """Uncover, exchange weights where the method does, and let clipping and momentum see only what
        lives."""
        self._uncover()
        if self.exchanges(t):
            self.masks = regrow(self.weights, self.masks, t, self.phases.steps)
            self._hold()
            self._forget()
        for weight, keep in self._living():
            if weight.grad is not None:
                keep_only_(ranks.local_tensor(weight.grad), keep)

    def exchanges(self, t: int) -> bool:
        """Whether step t asks for the gradients of what is cut, too."""
        return self.step.method == "rigl" and is_due(t, self.phases.steps)

    def _uncover(self) -> None:
        if self._is_covered:
            parts = self._parts()
            for name, values in self._covered.items():
                parts[name].copy_(values)
            self._is_covered = False

    @torch.no_grad()
    def after_step(self, t: int) -> None:
        """Cut where the plan says so after step t, and hold every zero that was cut."""
        done, cut_at = t + 1, self.phases.cut_at
        if done == cut_at:
            self._covered.clear()
        due = done == cut_at or (done > self.phases.start and (done - self.phases.start) % REFRESH == 0)
        if self.gradual and done <= cut_at and due:
            self._cut(self.scheduled(done))
        elif self.step.method in ("lp", "l1", "dwf") and self.target is not None and done == cut_at:
            self._cut(self._count(self.target))
        else:
            self._hold()

    @torch.no_grad()
    def finish(self, done: int) -> bool:
        """Leave exactly the target's zeros, whatever was done to the weights since the last step. Whether
        some were cut for that: after fewer steps than planned, or since what was cut has values again."""
        self._uncover()
        parts = self._parts()
        revived = self._sums([sum(int((parts[name] != 0)[~keep].sum()) for name, keep in self.masks.items())])
        due = self.target is not None and (done < self.phases.cut_at or revived[0] > 0)
        if self.target is not None and due:
            if revived[0]:  # other weights, such as a checkpoint's: its own zeros are the first to go
                self.masks = {}
            self._cut(self._count(self.target))
        self._hold()
        self._forget()
        return due

    @torch.no_grad()
    def _cut(self, count: int) -> None:
        if self.factors is not None:
            self._drop_factors()
        held = self._sums([sum(int((~keep).sum()) for keep in self.masks.values())])[0]
        self.masks = self._choose(max(count, held))
        self._hold()
        self._forget()

    @torch.no_grad()
    def _forget(self) -> None:
        """The averages of what is cut, so that momentum does not move it; exp_avg_sq moves nothing."""
        for weight, keep in self._living():
            state: dict[str, Any] = self.optimizer.state.get(weight, {})
            for key, value in state.items():
                part = ranks.local_tensor(value) if isinstance(value, Tensor) else None
                if part is not None and part.shape == keep.shape and key != "exp_avg_sq":
                    part.masked_fill_(~keep, 0.0)

    @torch.no_grad()
    def _hold(self) -> None:
        for weight, keep in self._living():
            keep_only_(ranks.local_tensor(weight.detach()), keep)

    @torch.no_grad()
    def near_zero(self) -> float:
        """Fraction of the prunable weights that are as good as zero."""
        arrived = ((w.abs() <= NEAR_ZERO * self.aim[name]).sum() for name, w in self._parts().items())
        return self._sums([sum(int(count) for count in arrived)])[0] / max(1, self.size)

    @torch.no_grad()
    def zeros(self) -> int:
        return self._sums([sum(int((w == 0).sum()) for w in self._parts().values())])[0]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights and the optimizer's state; tensors and numbers only."""
        factors = None if self.factors is None else self.factors.factors
        return {
            "steering": self.steering,
            "masks": dict(self.masks),
            "spare": dict(self.spare),
            "held": dict(self.held),
            "factors": factors,
            "start": self.start,
            "aim": self.aim,
            "base_lambda": None if self.decay is None else self.base_lambda,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the optimizer's state is loaded: the factors in it may be gone by then."""
        self.steering, self.start, self.aim = float(state["steering"]), state["start"], dict(state["aim"])
        if self.decay is not None:
            self.base_lambda = state["base_lambda"]
        self.masks, self.spare = dict(state["masks"]), dict(state["spare"])
        self.held = dict(state.get("held", {}))
        if self.decay is not None and self.selective:
            self.decay.spare = {id(self.weights[name]): keep for name, keep in self.spare.items()}
        if self.factors is not None and state["factors"] is None:
            self._drop_factors()
        for name, saved in (state["factors"] or {}).items():
            assert self.factors is not None
            for factor, value in zip(self.factors.factors[name], saved, strict=True):
                factor.copy_(value)

    def _drop_factors(self) -> None:
        assert self.factors is not None
        self.factors.remove()
        self.factors = None
