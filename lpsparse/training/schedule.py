"""The phases of a run, in optimizer steps: warm up, decay, cut, recover. Plain data; everything else asks it.

    warm up   the learning rate rises; nothing goes to zero; the optimizer's averages settle
    decay     weights go to zero under a target that rises cubically (Zhu and Gupta 2017, arXiv 1710.01878):
                  s(t) = S + (s0 - S) * (1 - t / T)**3
    cut       after step `cut_at` the target is met exactly
    recover   the mask is held, nothing decays, the learning rate falls to zero

Without a target there is no cut. All weights decay; with p < 1 the run ends by settling (SETTLE_SHARE).
"""

import math
from dataclasses import dataclass

from lpsparse.families import METHODS, SCORES
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.scores import SETTLED

# Without a target, p < 1 empties a band of magnitudes, but weights on their way through it freeze there as
# the learning rate ends. So the run ends by letting only those fall that are far under w_kill already, at
# full strength.
SETTLE_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Phases:
    steps: int
    warmup: int  # steps in which the learning rate rises
    start: int  # the first step that decays or cuts
    cut_at: int  # steps after which nothing new goes to zero
    ramp: str  # cubic | none
    schedule: str  # of the learning rate: cosine | linear | restart

    def progress(self, t: int) -> float:
        """Share 0..1 of the decay phase that is over after t steps."""
        return min(1.0, max(0, t - self.start) / max(1, self.cut_at - self.start))

    def rise(self, t: int) -> float:
        """Share 0..1 of the way from the zeros at the start to the target, after t steps."""
        if t >= self.cut_at:
            return 1.0
        return 1.0 if self.ramp == "none" else 1 - (1 - self.progress(t)) ** 3

    def rate(self, t: int) -> float:
        """The learning rate of step t (from 0), as a share of its peak."""
        if t < self.warmup:
            return (t + 1) / self.warmup
        if self.schedule == "restart":  # half a cosine until the cut, then from the peak again
            if t < self.cut_at:
                return 0.5 + 0.5 * _cosine(t - self.warmup, self.cut_at - self.warmup)
            top = max(self.cut_at, self.warmup)
            return _cosine(t - top, self.steps - top)
        done, of = t - self.warmup, self.steps - self.warmup
        return 1 - done / max(1, of) if self.schedule == "linear" else _cosine(done, of)

    def name(self, t: int) -> str:
        """What happens after t steps: warm up, decay or recover."""
        return "warm up" if t < self.start else "decay" if t < self.cut_at else "recover"

    def in_words(self) -> str:
        parts = (
            ("warm-up", self.start),
            ("decay", self.cut_at - self.start),
            ("recovery", self.steps - self.cut_at),
        )
        return ", ".join(f"{count} {name}" for name, count in parts if count > 0)


def _cosine(done: int, of: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * done / max(1, of)))


def plan_phases(step: FinetuneStep, steps: int) -> Phases:
    warmup = max(1, round(step.warmup * steps))
    if step.target_sparsity is not None:
        cut_at = max(1, min(steps, round(step.decay_share * steps)))
    else:
        cut_at = steps - round(SETTLE_SHARE * steps) if step.p < 1 else steps
    method = METHODS[step.method]
    settles = method.decays and SCORES[step.score].settles
    fades = method.cuts == "end" and step.cut != "gradual"  # has the warm-up of lambda
    start = SETTLED if settles else 0 if fades else warmup
    if step.target_sparsity is None:
        start = 0
    elif not settles:
        start = min(start, cut_at // 2)
    schedule = step.lr_schedule  # of all methods alike, so that they are compared at equal rates
    if schedule == "restart" and (step.target_sparsity is None or cut_at == steps):
        schedule = "cosine"
    return Phases(steps, warmup, start, cut_at, step.ramp, schedule)
