"""The training loop on accelerate, and measuring quality. One process and many are the same code."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader

from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.errors import InputError, NumericError, UsageError
from lpsparse.pruning.prunable import kept_in_words
from lpsparse.recipe import EvalStep, FinetuneStep
from lpsparse.training.conditioning import fold
from lpsparse.training.conditioning.base import Conditioning
from lpsparse.training.control import SparsityControl
from lpsparse.training.data import check_apart
from lpsparse.training.distill import Teacher, make_teacher
from lpsparse.training.loss import batch_loss, check_dropout
from lpsparse.training.model import quiet_transformers
from lpsparse.training.phases import plan_phases
from lpsparse.training.setup import choose_weights, make_conditioning, make_optimizer, resolve_auto
from lpsparse.training.tasks import TASKS
from lpsparse.training.tasks.base import Task

AUGMENT = {"image-classification": "crop-flip", "text-classification": "noise"}
_SAID = (  # beside what is said in words
    "allocation", "ramp", "p_start", "lambda_2", "selective", "masked_forward", "cautious", "prox", "factors",
    "gain_lr_ratio", "path_penalty", "lr_schedule", "distill", "distill_blocks", "r_drop", "augment",
)  # fmt: skip
_POOL = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True, slots=True)
class Progress:
    """One optimizer step, for a bar or a log."""

    step: int  # steps done
    steps: int
    epoch: int
    loss: float  # mean since the last one
    lr: float
    lambda_p: float
    target: float  # zeros that the plan asks for now
    sparsity: float  # exact zeros of the prunable weights
    near_zero: float  # as good as zero


@dataclass(frozen=True, slots=True)
class Measured:
    loss: float
    count: int
    accuracy: float | None

    def of(self, metric: str) -> float:
        return self.loss if metric == "loss" or self.accuracy is None else self.accuracy


@dataclass(frozen=True, slots=True)
class Trained:
    task: Task
    prunable: dict[str, tuple[bool, str]]  # name in OUT -> whether, and why
    before: Measured | None  # None: the head is fresh
    after: Measured
    facts: str  # steps, lambda_p, sum of learning rates, w_kill, in words


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint) -> Task:
    """Model and data of a step, checked; a fresh head and the data order follow from the seed."""
    quiet_transformers()
    torch.manual_seed(step.seed)
    if isinstance(step, FinetuneStep) and (step.eval_data or step.eval_split):
        check_apart(step.data, step.split, step.eval_data or step.data, step.eval_split or "validation")
    if isinstance(step, FinetuneStep) and step.augment not in ("none", AUGMENT.get(step.task)):
        what = f"--augment {step.augment} is not for --task {step.task}"
        raise UsageError(249, what, mend=f"use --augment {AUGMENT.get(step.task, 'none')}")
    try:
        return TASKS[step.task](step, checkpoint)
    except OSError as error:
        what = f"{error.filename or step.data}: {error.strerror or error}"
        raise InputError(371, what, mend="check the data and its permissions") from error


def evaluate(step: FinetuneStep | EvalStep, task: Task) -> Measured:
    """Mean loss and accuracy over the held-out examples,
    in eval mode and in float32 whatever training uses."""
    device = PartialState().device
    model = task.loaded.module.to(device).eval()
    # Examples of like length together: less padding. The sums do not depend on the order.
    examples = sorted(task.held_out, key=task.length) if task.length else task.held_out
    loss = count = correct = 0
    with torch.no_grad():
        for first in range(0, len(examples), step.batch_size):
            batch = task.collate(list(examples[first : first + step.batch_size]))
            logits, labels = task.predict(model, {key: value.to(device) for key, value in batch.items()})
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
            correct += int((logits.argmax(-1) == labels).sum())
    if not math.isfinite(loss):
        what = f"loss {loss} over {count} {task.unit} held out"
        raise NumericError(502, what, mend="look for NaN or Inf with `lpsparse report`")
    return Measured(loss / count, count, correct / count if task.metric == "accuracy" else None)


def plan_training(step: FinetuneStep, task: Task) -> dict[str, Any]:
    """What `train` would do, as plain data."""
    step = resolve_auto(step, task.loaded.module, _steps(step, task))
    prunable, weights = choose_weights(step, task)
    return {
        "method": step.method, "steps": _steps(step, task), "examples": len(task.train),
        "held_out": len(task.held_out),
        "prunable_weights": sum(weight.numel() for weight in weights.values()),
        "prunable_tensors": len(weights),
        "kept": kept_in_words(prunable), "fresh": list(task.loaded.new),
    }  # fmt: skip


def _steps(step: FinetuneStep, task: Task) -> int:
    return step.steps or max(1, round(step.epochs * math.ceil(len(task.train) / step.batch_size)))


def train(
    step: FinetuneStep, task: Task, on_step: Callable[[Progress], None], say: Callable[[str], None]
) -> Trained:
    """Train `task` in place by the step's method.
    Raises NumericError on a loss or gradient that is not finite."""
    if step.threads:
        torch.set_num_threads(step.threads)
    # One process may train twice, with another precision each time; accelerate has no public name for this.
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    accelerator = _accelerator(step)
    model = task.loaded.module
    step = resolve_auto(step, model, _steps(step, task))
    before = None if task.loaded.new else evaluate(step, task)
    prunable, weights = choose_weights(step, task)
    check_dropout(step, model)
    teacher = make_teacher(step, task)
    steps = _steps(step, task)
    say(kept_in_words(prunable))
    model.to(accelerator.device)  # before anything is kept beside the weights
    optimizer = make_optimizer(step, model, weights)
    conditioning = make_conditioning(step, model, weights, optimizer)
    control = SparsityControl(step, weights, optimizer, plan_phases(step, steps))
    facts = _in_words(step, control, steps)
    say(facts)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    _loop(step, task, accelerator, prepared, wrapped, control, conditioning, teacher, on_step)
    fold(model)
    if teacher is not None:
        teacher.close()
    control.after_step(steps)  # hold the mask through the last retraction
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # or it would be measured under autocast
    task.loaded.round_to_storage()
    return Trained(task, prunable, before, evaluate(step, task), facts)


def _accelerator(step: FinetuneStep) -> Accelerator:
    try:
        return Accelerator(mixed_precision=step.mixed_precision)
    except (ValueError, ImportError) as error:  # accelerate's own check of the device
        what = f"--mixed-precision {step.mixed_precision}: {str(error).strip().splitlines()[0]}"
        raise UsageError(248, what, mend="use bf16 or no") from None


def _in_words(step: FinetuneStep, control: SparsityControl, steps: int) -> str:
    text = f"{steps} steps, method {step.method}, {len(control.weights)} tensors of {control.size:,} weights"
    if step.condition != "none":
        text += f", conditioned by {step.condition}"
    if said := step.options(_SAID):
        text += f", {' '.join(said)}"
    if control.target is not None and step.method not in ("one-shot", "rigl"):
        text += f"; steps: {control.phases.in_words()}"
    if control.target is not None:
        text += f"; chosen by {step.score}"
        if step.cut == "gradual":
            text += ", cut as the target rises"
        if step.keep_zeros and control.start > float(control.target) * control.size:
            text += f"; --keep-zeros keeps the {control.start:,} zeros of MODEL, more than the target"
    if control.decay is None:
        return text
    text += (
        f"; p {control.p:g}, lambda_p {control.base_lambda:.4g} (ours; the authors' "
        f"{control.base_lambda / control.p:.4g})"
    )
    if control.selective:
        return f"{text}, on the weights that the current target would cut"
    if control.p >= 2:
        return f"{text}; with p of 2 or more no weight reaches zero by itself: give a --target-sparsity"
    text += f", sum of learning rates {control.sum_lr:.4g}"
    if step.p_start is None:  # with one the budget's formula does not hold
        text += f", w_kill {control.w_kill:.4g}"
    settling = steps - control.phases.cut_at
    if control.p >= 1 or control.target is not None or settling == 0:
        return text
    return (
        f"{text}; in the last {settling} steps what is far under w_kill falls, its lambda rising as lr ends"
    )


def _loop(
    step: FinetuneStep, task: Task, accelerator: Accelerator, model: nn.Module, optimizer: Any,
    control: SparsityControl, conditioning: Conditioning | None, teacher: Teacher | None,
    on_step: Callable[[Progress], None],
) -> None:  # fmt: skip
    rates = control.rates
    generator = torch.Generator().manual_seed(step.seed)
    losses: list[float] = []
    batches = _batches(step, task, accelerator, len(rates))
    model.train()
    for t, (epoch, batch) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rates[t] * group.get("lr_ratio", 1.0)
        if conditioning is not None:
            conditioning.progress(control.phases.progress(t + 1))
        control.before_step(t)
        if task.augment is not None:
            batch = task.augment(batch, generator)
        with accelerator.autocast():
            loss = batch_loss(step, task, model, batch, teacher)
        accelerator.backward(loss)
        if conditioning is not None:
            conditioning.restore()
        control.after_backward(t)
        moved = [param for group in optimizer.param_groups for param in group["params"]]  # gains included
        norm = float(accelerator.clip_grad_norm_(moved, step.clip or math.inf) or 0)
        losses.append(float(loss.detach()))
        # A loss scaler (fp16) skips a step whose gradients overflow and goes on with a smaller scale.
        if not math.isfinite(losses[-1]) or (accelerator.scaler is None and not math.isfinite(norm)):
            what = f"step {t + 1} of {len(rates)}: loss {losses[-1]}, gradient norm {norm}"
            raise NumericError(501, what, mend="lower --lr; nothing was written, the input is untouched")
        optimizer.step()
        optimizer.zero_grad()
        if conditioning is not None:
            conditioning.retract()
        control.after_step(t)
        if (t + 1) % step.log_every == 0 or t + 1 == len(rates):
            sparsity = control.zeros() / max(1, control.size)
            mean = sum(losses) / len(losses)
            facts = (
                rates[t],
                control.lambda_p,
                control.scheduled(t + 1) / max(1, control.size),
                sparsity,
                control.near_zero(),
            )
            on_step(Progress(t + 1, len(rates), epoch, mean, *facts))
            losses.clear()


def _batches(
    step: FinetuneStep, task: Task, accelerator: Accelerator, steps: int
) -> Iterator[tuple[int, Any]]:
    """`steps` batches; their order is a pure function of seed, epoch and step."""
    given, epoch = 0, 0
    while given < steps:
        loader: Any = accelerator.prepare_data_loader(
            DataLoader(task.train, batch_sampler=batch_order(step, task, epoch), collate_fn=task.collate)  # pyright: ignore[reportArgumentType]
        )
        for batch in loader:
            if given == steps:
                return
            given += 1
            yield epoch, batch
        epoch += 1


def batch_order(step: FinetuneStep, task: Task, epoch: int) -> list[list[int]]:
    """Indices of each batch of an epoch;
    examples of like length share a batch where the task knows lengths."""
    generator = torch.Generator().manual_seed(step.seed * 1_000_003 + epoch)
    order = torch.randperm(len(task.train), generator=generator).tolist()
    length = task.length
    if length is None:
        return [order[i : i + step.batch_size] for i in range(0, len(order), step.batch_size)]
    pool = step.batch_size * _POOL
    batches: list[list[int]] = []
    for i in range(0, len(order), pool):
        near = sorted(order[i : i + pool], key=lambda k: length(task.train[k]))
        batches += [near[j : j + step.batch_size] for j in range(0, len(near), step.batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
