"""Make what a run needs, in the order that it needs: task, processes, model, optimizer, method."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from lpsparse.borrowed import borrow
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.families import TASKS
from lpsparse.parallel import ranks
from lpsparse.parallel.environment import has_other_ranks
from lpsparse.parallel.progress import Brief
from lpsparse.pruning.select import target_count
from lpsparse.pruning.targets import Chosen, kept_in_words
from lpsparse.steps.finetune import EvalStep, FinetuneStep, is_training
from lpsparse.training.data import check_apart, held_out_of
from lpsparse.training.loss import Teacher, blocks, check_dropout, make_teacher
from lpsparse.training.memory import estimate
from lpsparse.training.optimizers import make_optimizer, switch
from lpsparse.training.order import steps_of
from lpsparse.training.quality import Measured, evaluate
from lpsparse.training.settings import (
    check_shard,
    freeze_,
    in_words,
    prunable_parameters,
    resolve_auto,
    warning_of,
)
from lpsparse.training.sparsity import Driver
from lpsparse.training.tasks.base import Task

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is made of. Nothing of it is replaced while the run goes."""

    step: FinetuneStep  # its autos are resolved
    task: Task
    accelerator: Accelerator
    model: nn.Module  # as the loop calls it: wrapped where there are several processes
    optimizer: Any  # wrapped, too
    driver: Driver
    teacher: Teacher | None
    prunable: Chosen  # name in OUT -> whether, and why
    before: Measured | None  # None: the head is fresh, or the run resumes
    facts: Brief  # steps, lambda_p, sum of learning rates, w_kill, in words
    say: Say


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint, *, spread: bool = True) -> Task:
    """Load and check model and data of a step; a fresh head and the data order follow from the seed.

    All processes call it. Without `spread` only rank 0 has the model's values (`ranks.distribute`).
    """
    torch.manual_seed(step.seed)
    held = held_out_of(step) if is_training(step) else None
    if held is not None:
        check_apart(step.data, step.split, *held)
    kind = TASKS[step.task]
    if is_training(step) and step.augment not in ("none", kind.augment):
        what = f"--augment {step.augment} is not for --task {step.task}"
        raise UsageError(249, what, hint=f"use --augment {kind.augment}")
    try:
        task = kind.prepare(step, checkpoint)
    except OSError as error:
        what = f"{error.filename or step.data}: {error.strerror or error}"
        raise InputError(371, what, hint="check the data and its permissions") from error
    if spread:
        device = PartialState().device or torch.device("cpu")
        ranks.distribute(task.loaded.module, device, shard=False, bf16=False)
    return task


def plan_training(step: FinetuneStep, task: Task) -> dict[str, Any]:
    """Return what `train` would do, as plain data."""
    step = resolve_auto(step, task.loaded.module, steps_of(step, task))
    freeze_(step, task.loaded)
    prunable, weights = prunable_parameters(step, task.loaded)
    params = list(task.loaded.module.parameters())
    size = sum(weight.numel() for weight in weights.values())
    zeros = None
    if step.target_sparsity is not None:
        there = sum(int((weight == 0).sum()) for weight in weights.values())
        zeros = target_count(step.target_sparsity, size, there)
    trained = sum(param.numel() for param in params if param.requires_grad)
    frozen = sum(param.numel() for param in params) - trained
    memory = estimate(step, trained=trained, frozen=frozen, prunable=size, processes=step.processes or 1)
    return {
        "bytes_kept": memory.kept,
        "bytes_peak": memory.kept + memory.peak,
        "method": step.method,
        "steps": steps_of(step, task),
        "examples": len(task.train),
        "held_out": len(task.held_out),
        "processes": step.processes or 1,
        "prunable_weights": size,
        "prunable_tensors": len(weights),
        "zeros": zeros,
        "kept": kept_in_words(prunable),
        "fresh": list(task.loaded.new),
        "warning": warning_of(step, steps_of(step, task)),
    }


def build(step: FinetuneStep, task: Task, say: Say, *, resumes: bool) -> Setup:
    """Everything before the first step. All processes call it. The weights stay as they are, and are measured
    unless the run `resumes`. Raises UsageError for settings that this model or machine cannot have."""
    if step.threads:
        torch.set_num_threads(step.threads)
    accelerator = start(step)
    model, steps = task.loaded.module, steps_of(step, task)
    step = resolve_auto(step, model, steps)
    warning = warning_of(step, steps)
    if warning is not None:
        say(f"warning: {warning}")
    if step.shard:
        check_shard(step)
    check_dropout(step, model)
    teacher = make_teacher(step, task)
    for each in (model,) if teacher is None else (model, teacher.model):
        bf16 = step.mixed_precision == "bf16"
        ranks.distribute(each, accelerator.device, blocks(each), shard=step.shard, bf16=bf16)
    freeze_(step, task.loaded)
    prunable, weights = prunable_parameters(step, task.loaded)  # sharding has put others in their place
    say(kept_in_words(prunable))
    before = None if task.loaded.new or resumes else evaluate(step, task, "before")
    _set_module(step, model)
    optimizer = make_optimizer(step, model, weights)
    switch(optimizer, "train")
    # Sharding is torch's own: accelerate's does not know processes without a GPU.
    if ranks.world_size() > 1 and not step.shard and _leaves_unused(task, accelerator.device):
        unused: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator.ddp_handler = unused
    prepared = model if step.shard else accelerator.prepare(model)
    wrapped = accelerator.prepare(optimizer)
    fresh = {name for name, out in task.loaded.names.items() if out in task.loaded.new}
    driver = Driver(step, model, weights, optimizer, steps, fresh)
    facts = in_words(step, driver.control)
    say(facts)
    return Setup(step, task, accelerator, prepared, wrapped, driver, teacher, prunable, before, facts, say)


def start(step: FinetuneStep) -> Accelerator:
    """Accelerate for this run; it joins the processes of the job."""
    reset = borrow("accelerate.state:AcceleratorState._reset_state")
    if reset is not None:
        reset()
    accelerator = _accelerator(step)
    ranks.make_barrier_group()
    return accelerator


def _accelerator(step: FinetuneStep) -> Accelerator:
    has_gpu = torch.accelerator.is_available()
    if step.mixed_precision == "fp16" and not has_gpu:
        raise UsageError(248, "--mixed-precision fp16: needs a GPU", hint="use auto, or no in a new process")
    # By default accelerate treats each process without a GPU as a run of its own.
    alone_on_cpu = has_other_ranks() and not has_gpu
    try:
        limit = InitProcessGroupKwargs(timeout=timedelta(seconds=step.rank_timeout))
        accelerator = Accelerator(
            mixed_precision=step.mixed_precision, cpu=alone_on_cpu, kwargs_handlers=[limit]
        )
    except (ValueError, ImportError) as error:  # accelerate's own check of the device, or of its settings
        if step.mixed_precision == "no":
            what = f"accelerate does not start: {str(error).strip().splitlines()[0]}"
            hint = "check the variables ACCELERATE_* and OMP_NUM_THREADS, and `accelerate env`"
            raise UsageError(258, what, hint=hint) from None
        what = f"--mixed-precision {step.mixed_precision}: {str(error).strip().splitlines()[0]}"
        raise UsageError(248, what, hint="use auto, or no in a new process") from None
    assert accelerator.num_processes == ranks.world_size() or not has_other_ranks()
    return accelerator


def _set_module(step: FinetuneStep, model: Any) -> None:
    """--checkpointing and --compile, in place. Raises UsageError for a model that cannot be checkpointed."""
    if step.checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            what = f"--checkpointing: {type(model).__name__} has no gradient checkpointing"
            raise UsageError(255, what, hint="use --accumulate for less memory")
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
        (enable or model.gradient_checkpointing_enable)()
    if step.compile:
        model.compile()


def _leaves_unused(task: Task, device: torch.device) -> bool:
    """Return whether a trained parameter gets no gradient: DDP has to look for such."""
    module = task.loaded.module.eval()
    batch = task.collate([task.train[0]])
    batch = batch if task.augment is None else task.augment(batch, [0])
    logits, labels = task.predict(module, {key: value.to(device) for key, value in batch.items()})
    torch.nn.functional.cross_entropy(logits, labels).backward()
    unused = any(param.requires_grad and param.grad is None for param in module.parameters())
    module.zero_grad(set_to_none=True)
    return unused
