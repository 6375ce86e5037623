"""The loss of one batch: cross entropy or distillation, with R-Drop over either.

R-Drop (Liang et al. 2021, arXiv 2106.14448, section 2): each example passes twice through the model, with
dropout of its own, and the two predictions P1, P2 are to agree. Halved here; the scale of the loss stays:
    loss = mean over both passes + a / 2 * (KL(P1 || P2) + KL(P2 || P1)) / 2
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpsparse.errors import UsageError
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.distill import Teacher
from lpsparse.training.tasks.base import Batch, Task


def batch_loss(
    step: FinetuneStep, task: Task, model: nn.Module, batch: Batch, teacher: Teacher | None
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
