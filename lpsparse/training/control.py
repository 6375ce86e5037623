"""Bring the weights to a target sparsity: choose what goes, cut exactly, and hold what is cut at zero.

How weights go is the method's matter: `methods`, one file each. Phases and the rising target: `schedule`.
What ranks weights: `scores`; how a count is shared among tensors: `allocation`. What is cut is held in the
weights, their gradients and the optimizer's averages.
"""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpsparse.families import METHODS, SCORES
from lpsparse.parallel import ranks
from lpsparse.pruning.select import target_count
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.allocation import allocate, keep_only_, kth_smallest, smallest_masks
from lpsparse.training.attached import own_rate
from lpsparse.training.methods import Method
from lpsparse.training.schedule import Phases

NEAR_ZERO = 0.05  # of the starting threshold: what lies below this has arrived, as far as a cut can tell


def quantile(weights: Iterable[Tensor], count: int, *, across: bool = False) -> float:
    """The count-th smallest magnitude (count from 1) over all tensors; 0 when count is 0."""
    if count == 0:
        return 0.0
    return float(kth_smallest(torch.cat([w.detach().abs().flatten() for w in weights]), count, across=across))


class SparsityControl:
    """Drives one run. Call `begin` once. For each optimizer step t (from 0) call `before_step`, then, after
    the backward pass, `after_backward`, then the optimizer, then `after_step`; at the end `finish`."""

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
        """Look at the weights; change nothing. `others` are parameters that are not cut; keep_zeros holds
        their zeros, too. `top` is the largest of the groups' own learning rates (`own_rate`). Raises
        ValueError while the score is still auto (`settings.resolve_auto`)."""
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
        self.held: dict[str, Tensor] = {}  # the same, of the others
        self.covered: dict[str, Tensor] = {}  # values of what is covered now; kept from step to step
        self._is_covered = False
        # The magnitudes at which each tensor would be cut now; without a target, at half of what is not zero.
        half = self.start + (self.size - self.start) // 2
        self.aim = self._edges(max(1, half if self.target is None else self.count(self.target)))
        if step.keep_zeros:
            self.masks = {name: w != 0 for name, w in self.parts().items()}
            living = {name: ranks.local_tensor(w.detach()) != 0 for name, w in self.others.items()}
            self.held = {name: keep for name, keep in living.items() if not keep.all()}
        self.method: Method = METHODS[step.method](self)

    @property
    def w_kill(self) -> float:
        return self.method.w_kill

    def begin(self) -> None:
        """Attach the method to the optimizer. Weights change from the first `before_step` on."""
        self.method.begin()

    @torch.no_grad()
    def before_step(self, t: int) -> None:
        """Let the method prepare step t (from 0): it cuts, sets its decay, covers what is to go."""
        self.method.before_step(t)

    @torch.no_grad()
    def after_backward(self, t: int) -> None:
        """Uncover, let the method see all gradients, then leave those of what lives to clipping and
        momentum."""
        self._uncover()
        self.method.after_backward(t)
        for weight, keep in self._living():
            if weight.grad is not None:
                keep_only_(ranks.local_tensor(weight.grad), keep)

    @torch.no_grad()
    def after_step(self, t: int) -> None:
        """Cut where the method says so after step t, and hold every zero that was cut."""
        done = t + 1
        if done == self.phases.cut_at:
            self.covered.clear()
        count = self.method.due(done)
        if count is None:
            self.hold()
        else:
            self.cut(count)

    @torch.no_grad()
    def finish(self, done: int) -> bool:
        """Leave exactly the target's zeros, whatever was done to the weights since the last step. Return
        whether some were cut for that: after fewer steps than planned, or where cut weights have values
        again."""
        self._uncover()
        parts = self.parts()
        revived = self._sums([sum(int((parts[name] != 0)[~keep].sum()) for name, keep in self.masks.items())])
        due = self.target is not None and (done < self.phases.cut_at or revived[0] > 0)
        if self.target is not None and due:
            if revived[0]:  # other weights, such as a checkpoint's: its own zeros are the first to go
                self.masks = {}
            self.cut(self.count(self.target))
        self.hold()
        self.forget()
        self.method.end()
        return due

    def count(self, sparsity: Decimal) -> int:
        """Zeros at a sparsity of the weights; never fewer than there were at the start."""
        return target_count(sparsity, self.size, self.start)

    def scheduled(self, t: int) -> int:
        """Zeros asked for after t steps."""
        if self.target is None:
            return self.start
        if t >= self.phases.cut_at:
            return self.count(self.target)
        begin, end = self.start / self.size, float(self.target)
        return self.count(Decimal(begin + (end - begin) * self.phases.rise(t)))

    def share_of_rate(self, group: dict[str, Any]) -> float:
        """The group's learning rate as a share of the largest; 1 for one that does not move."""
        return 1.0 if self.top is None else own_rate(group) / self.top or 1.0

    def parts(self) -> dict[str, Tensor]:
        """The values of the weights, as far as this process has them, on the same memory."""
        return {name: ranks.local_tensor(weight.detach()) for name, weight in self.weights.items()}

    @torch.no_grad()
    def choose(self, count: int) -> dict[str, Tensor]:
        """True where a weight stays when `count` go. What is cut stays cut: its score alone is 0. Raises
        UsageError where the score does not know one of the weights."""
        scores = SCORES[self.step.score].of(self.weights, self.optimizer)
        for score in scores.values():
            score.clamp_(min=torch.finfo(score.dtype).tiny)
        for name, keep in self.masks.items():
            scores[name].masked_fill_(~keep, 0.0)
        return smallest_masks(scores, allocate(scores, count, self.step.allocation, across=self.across))

    @torch.no_grad()
    def cut(self, count: int) -> None:
        """Set `count` weights to zero for good, those that were cut before among them."""
        self.method.before_cut()
        held = self._sums([sum(int((~keep).sum()) for keep in self.masks.values())])[0]
        self.masks = self.choose(max(count, held))
        self.hold()
        self.forget()

    @torch.no_grad()
    def hold(self) -> None:
        """Set what was cut to zero again."""
        for weight, keep in self._living():
            keep_only_(ranks.local_tensor(weight.detach()), keep)

    @torch.no_grad()
    def forget(self) -> None:
        """Clear the averages of what is cut, so that momentum does not move it; exp_avg_sq moves nothing."""
        for weight, keep in self._living():
            state: dict[str, Any] = self.optimizer.state.get(weight, {})
            for key, value in state.items():
                part = ranks.local_tensor(value) if isinstance(value, Tensor) else None
                if part is not None and part.shape == keep.shape and key != "exp_avg_sq":
                    part.masked_fill_(~keep, 0.0)

    def cover(self, keep: dict[str, Tensor]) -> None:
        """Set what is not kept to zero for the forward pass; `after_backward` puts the values back."""
        for name, part in self.parts().items():
            if name not in self.covered:
                self.covered[name] = torch.empty_like(part)
            self.covered[name].copy_(part)
            keep_only_(part, keep[name])
        self._is_covered = True

    def _uncover(self) -> None:
        if self._is_covered:
            parts = self.parts()
            for name, values in self.covered.items():
                parts[name].copy_(values)
            self._is_covered = False

    @torch.no_grad()
    def near_zero(self) -> float:
        """Fraction of the prunable weights that are as good as zero."""
        arrived = ((w.abs() <= NEAR_ZERO * self.aim[name]).sum() for name, w in self.parts().items())
        return self._sums([sum(int(count) for count in arrived)])[0] / max(1, self.size)

    @torch.no_grad()
    def zeros(self) -> int:
        return self._sums([sum(int((w == 0).sum()) for w in self.parts().values())])[0]

    def _edges(self, count: int) -> dict[str, float]:
        """The magnitude under which each tensor has its share of `count` weights; 0 where that is none."""
        sizes, across = {name: part.abs() for name, part in self.parts().items()}, self.across
        own = allocate(sizes, count, self.step.allocation, across=across)
        counts = dict(zip(sorted(own), self._sums([own[name] for name in sorted(own)]), strict=True))
        return {name: quantile([size], counts[name], across=across) for name, size in sizes.items()}

    def _living(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of which something is held at zero, and True where they live."""
        yield from ((self.weights[name], keep) for name, keep in self.masks.items())
        yield from ((self.others[name], keep) for name, keep in self.held.items())

    def _sums(self, counts: list[int]) -> list[int]:
        """Sum counts of this process's parts over all processes."""
        return [int(count) for count in ranks.all_reduce_sum(counts)] if self.across else counts

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights and the optimizer's state; tensors and numbers only."""
        common = {
            "steering": 1.0,
            "masks": dict(self.masks),
            "spare": {},
            "held": dict(self.held),
            "factors": None,
            "start": self.start,
            "aim": self.aim,
            "base_lambda": None,
        }
        return common | self.method.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the optimizer's state is loaded, which may lack the factors of `dwf` by then."""
        self.start, self.aim = state["start"], dict(state["aim"])
        self.masks, self.held = dict(state["masks"]), dict(state.get("held", {}))
        self.method.load_state_dict(state)
