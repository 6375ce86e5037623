"""The loss of one batch: cross entropy or distillation, with R-Drop over either.

Distillation is from the model as it was loaded: its outputs (Hinton et al. 2015, arXiv 1503.02531) and the
outputs of its blocks (Romero et al. 2014, arXiv 1412.6550; same shapes here, so no regressor is needed).

    loss = (1 - d) * CE + d * T**2 * KL(teacher / T || student / T) + b * mean over blocks of |h - h_t|**2 /
    |h_t|**2

R-Drop (Liang et al. 2021, arXiv 2106.14448, section 2): each example passes twice through the model, with
dropout of its own, and the two predictions P1, P2 are to agree. Halved here; the scale of the loss stays:
    loss = mean over both passes + a / 2 * (KL(P1 || P2) + KL(P2 || P1)) / 2
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpsparse.errors import UsageError
from lpsparse.parallel import ranks
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.tasks.base import Batch, Task


def batch_loss(
    step: FinetuneStep, task: Task, model: nn.Module, batch: Batch, teacher: "Teacher | None"
) -> Tensor:
    """The scalar loss of `model` on `batch`, whose values have the example as their first dimension."""
    passes = 2 if step.r_drop else 1
    repeated = {key: torch.cat([value] * passes) for key, value in batch.items()}
    logits, labels = task.predict(model, repeated)
    if teacher is None:
        loss = functional.cross_entropy(logits, labels)
    else:
        loss = teacher.loss(logits, labels, batch, passes)
    return loss + step.r_drop / 2 * disagreement(*logits.chunk(2)) if step.r_drop else loss


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric Kullback-Leibler divergence of two (count, classes) logits, in nats, mean over count."""
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    return ((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2


def check_dropout(step: FinetuneStep, model: nn.Module) -> None:
    """Raises UsageError when --r-drop is asked for and the two passes could not differ."""
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules())
    if step.r_drop and not drops:
        what = "--r-drop: the model has no dropout, so that two passes give the same"
        raise UsageError(247, what, hint="leave --r-drop out")


class Teacher:
    """A frozen copy of the task's model, and the loss of a student against it.
    `d` and `b` come from the step."""

    def __init__(self, step: FinetuneStep, task: Task) -> None:
        self.step, self.task = step, task
        self.model = copy.deepcopy(task.loaded.module).eval().requires_grad_(False)
        self.theirs, self.ours = _Taps(), _Taps()
        if step.distill_blocks and not list(blocks(self.model)):
            what = "--distill-blocks: the model has no nn.ModuleList or nn.Sequential of blocks"
            raise UsageError(246, what, hint="use --distill alone")

    def open(self) -> None:
        """From now on every forward pass of the student is followed by one call of `loss`."""
        if self.step.distill_blocks:
            self.theirs.attach(self.model)
            self.ours.attach(self.task.loaded.module)

    def loss(self, logits: Tensor, labels: Tensor, batch: Batch, passes: int = 1) -> Tensor:
        """The loss of the student's `logits`,
        whose forward pass on `batch`, repeated `passes` times, has just run."""
        with torch.no_grad():
            theirs, _ = self.task.predict(self.model, batch)
        ranks.reshard(self.model)
        theirs = torch.cat([theirs] * passes)
        heat, share = self.step.temperature, self.step.distill
        gap = functional.kl_div(
            functional.log_softmax(logits / heat, -1),
            functional.log_softmax(theirs / heat, -1),
            log_target=True,
            reduction="batchmean",
        )
        total = (1 - share) * functional.cross_entropy(logits, labels) + share * heat**2 * gap
        return total + self.step.distill_blocks * self._blocks(passes) if self.step.distill_blocks else total

    def _blocks(self, passes: int) -> Tensor:
        pairs = zip(self.ours.take(), self.theirs.take(), strict=True)
        errors = [_relative(ours.float(), torch.cat([theirs.float()] * passes)) for ours, theirs in pairs]
        return torch.stack(errors).mean()

    def close(self) -> None:
        """Take the taps off the student."""
        for handle in self.ours.handles:
            handle.remove()


def make_teacher(step: FinetuneStep, task: Task) -> Teacher | None:
    """None when distillation is off. Raises UsageError for a checkpoint that has no head to learn from."""
    if step.distill == 0 and step.distill_blocks == 0:
        return None
    if task.loaded.new:
        what = f"--distill: the checkpoint has no head yet ({', '.join(task.loaded.new)})"
        raise UsageError(245, what, hint="fine-tune it with --method dense first, or --distill 0")
    return Teacher(step, task)


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


class _Taps:
    """Keeps the output of each block of the last forward pass."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self._outputs: list[Tensor] = []

    def attach(self, model: nn.Module) -> None:
        self.handles = [block.register_forward_hook(self._keep) for block in blocks(model)]

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._outputs.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        outputs, self._outputs = self._outputs, []
        return outputs


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The repeated parts of a model: what lies in its outermost lists and holds two matrices or more."""
    for module in model.children():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for part in module:
                if sum(param.ndim >= 2 for param in part.parameters()) >= 2:
                    yield part
        else:
            yield from blocks(module)
