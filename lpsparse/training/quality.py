"""How good a model is on the held-out examples."""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import nn

from lpsparse.errors import NumericError
from lpsparse.parallel import ranks
from lpsparse.parallel.progress import advance, phase
from lpsparse.steps.finetune import EvalStep, FinetuneStep, is_training
from lpsparse.training.data import digests, find, held_out_of
from lpsparse.training.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Measured:
    loss: float
    count: int
    accuracy: float | None
    loss_error: float  # standard error of the mean, examples (tokens) taken as independent

    def of(self, metric: str) -> float:
        return self.loss if metric == "loss" or self.accuracy is None else self.accuracy

    def error_of(self, metric: str) -> float:
        """Standard error of `of`."""
        if metric == "loss" or self.accuracy is None:
            return self.loss_error
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)


@dataclass(frozen=True, slots=True)
class Held:
    """The data that quality is measured on."""

    names: str  # of files
    sha256: str  # of the examples, and of how they are read: what two figures must share to be compared


def held_of(step: FinetuneStep | EvalStep, task: Task) -> Held:
    """Equal where `finetune` and `eval` measure the same rows in the same way."""
    (data, split), apart = (step.data, step.split), None
    if is_training(step):
        held = held_out_of(step)
        data, split = held or (data, split)
        apart = None if held else (step.eval_fraction, step.seed)  # which share is set aside
    how = (step.task, step.max_length, step.text_field, step.label_field, task.view)
    files, part, _ = find(data, split)
    own = (digests(data, split), (part.start or 0, part.stop), apart, how)
    names = ", ".join(path.name for path in files)
    return Held(names, hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest())


def evaluate(step: FinetuneStep | EvalStep, task: Task, when: str = "") -> Measured:
    """Mean loss and accuracy over the held-out examples, in eval mode and in float32 whatever training uses.
    All processes call it and share the examples. Its progress is called measuring, and `when`."""
    unit = "blocks" if task.unit == "tokens" else task.unit
    with phase(f"measuring {when}".rstrip(), len(task.held_out), unit):
        return _evaluated(step, task, unit)


def _evaluated(step: FinetuneStep | EvalStep, task: Task, unit: str) -> Measured:
    device = PartialState().device
    model = task.loaded.module.to(device).eval()
    # Examples of like length together: less padding. The sums do not depend on the order.
    examples = sorted(task.held_out, key=task.length) if task.length else task.held_out
    loss = square = count = correct = 0
    rank, world_size = ranks.rank(), ranks.world_size()
    with torch.no_grad():
        for first in range(0, len(examples), step.batch_size):
            places = range(first, min(first + step.batch_size, len(examples)))[rank::world_size]
            mine = [examples[place] for place in places]
            batch = task.collate(mine or [examples[first]])  # all of a sharded model go through it together
            if task.measured is not None:
                batch = task.measured(batch, list(places) or [first])
            logits, labels = task.predict(model, {key: value.to(device) for key, value in batch.items()})
            if mine:
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
                loss += float(losses.sum())
                square += float(losses.double().square().sum())
                count += len(labels)
                correct += int((logits.argmax(-1) == labels).sum())
            advance(min(step.batch_size, len(examples) - first), unit)
    ranks.reshard(model)
    loss, square, count, correct = ranks.all_reduce_sum([loss, square, count, correct])
    if not math.isfinite(loss):
        what = f"loss {loss} over {int(count)} {task.unit} held out"
        raise NumericError(502, what, hint="look for NaN or Inf with `lpsparse report`")
    mean = loss / count
    error = math.sqrt(max(square / count - mean * mean, 0) / count)
    return Measured(mean, int(count), correct / count if task.metric == "accuracy" else None, error)
