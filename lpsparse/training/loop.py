"""The training loop on accelerate. One process and many are the same code."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from lpsparse.borrowed import borrow
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.errors import InputError, UsageError
from lpsparse.families import TASKS
from lpsparse.parallel import ranks
from lpsparse.parallel.environment import has_other_ranks
from lpsparse.pruning.select import target_count
from lpsparse.pruning.targets import Chosen, kept_in_words
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.training.data import check_apart, held_out_of
from lpsparse.training.distill import blocks, make_teacher
from lpsparse.training.loss import check_dropout
from lpsparse.training.memory import estimate
from lpsparse.training.optimizers import switch
from lpsparse.training.order import steps_of
from lpsparse.training.quality import Measured, evaluate
from lpsparse.training.resume import States
from lpsparse.training.run import Progress, Run
from lpsparse.training.setup import (
    check_shard,
    choose_weights,
    in_short,
    leaves_unused,
    make_optimizer,
    prepare_module,
    resolve_auto,
)
from lpsparse.training.sparsity import Method
from lpsparse.training.stopping import listening
from lpsparse.training.summary import in_words
from lpsparse.training.tasks.base import Task

AUGMENT = {"image-classification": "crop-flip", "text-classification": "noise"}


@dataclass(frozen=True, slots=True)
class Trained:
    task: Task
    prunable: Chosen  # name in OUT -> whether, and why
    before: Measured | None  # None: the head is fresh
    after: Measured
    facts: str  # steps, lambda_p, sum of learning rates, w_kill, in words


def prepare(step: FinetuneStep | EvalStep, checkpoint: Checkpoint, *, spread: bool = True) -> Task:
    """Model and data of a step, checked; a fresh head and the data order follow from the seed.

    All processes call it. Without `spread` only process 0 has the model's values (`distributed.spread`).
    """
    torch.manual_seed(step.seed)
    held = held_out_of(step) if isinstance(step, FinetuneStep) else None
    if held is not None:
        check_apart(step.data, step.split, *held)
    if isinstance(step, FinetuneStep) and step.augment not in ("none", AUGMENT.get(step.task)):
        what = f"--augment {step.augment} is not for --task {step.task}"
        raise UsageError(249, what, hint=f"use --augment {AUGMENT.get(step.task, 'none')}")
    try:
        task = TASKS[step.task](step, checkpoint)
    except OSError as error:
        what = f"{error.filename or step.data}: {error.strerror or error}"
        raise InputError(371, what, hint="check the data and its permissions") from error
    if spread:
        device = PartialState().device or torch.device("cpu")
        ranks.distribute(task.loaded.module, device, shard=False, bf16=False)
    return task


def plan_training(step: FinetuneStep, task: Task) -> dict[str, Any]:
    """What `train` would do, as plain data."""
    step = resolve_auto(step, task.loaded.module, steps_of(step, task))
    prunable, weights = choose_weights(step, task.loaded)
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
        "warning": in_short(step, steps_of(step, task)),
    }


def train(
    step: FinetuneStep,
    task: Task,
    on_step: Callable[[Progress], None],
    say: Callable[[str], None],
    states: States,
) -> Trained:
    """Train `task` in place by the step's method, from the state that `states` has found, if any.

    All processes call it. Raises NumericError on a loss or gradient that is not finite, ResumableError and
    InterruptError when it was asked to stop and has saved its state.
    """
    if step.threads:
        torch.set_num_threads(step.threads)
    accelerator = start(step)
    model = task.loaded.module
    steps = steps_of(step, task)
    step = resolve_auto(step, model, steps)
    short = in_short(step, steps)
    if short is not None:
        say(f"warning: {short}")
    if step.shard:
        check_shard(step)
    check_dropout(step, model)
    teacher = make_teacher(step, task)
    for each in (model,) if teacher is None else (model, teacher.model):
        bf16 = step.mixed_precision == "bf16"
        ranks.distribute(each, accelerator.device, blocks(each), shard=step.shard, bf16=bf16)
    prunable, weights = choose_weights(step, task.loaded)  # sharding has put others in their place
    say(kept_in_words(prunable))
    found = states.read()
    before = None if task.loaded.new or found is not None else evaluate(step, task, "before")
    prepare_module(step, model)
    optimizer = make_optimizer(step, model, weights)
    switch(optimizer, "train")
    # Sharding is torch's own: accelerate's does not know processes without a GPU.
    if ranks.world_size() > 1 and not step.shard and leaves_unused(task, accelerator.device):
        unused: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator.ddp_handler = unused
    prepared = model if step.shard else accelerator.prepare(model)
    wrapped = accelerator.prepare(optimizer)
    fresh = {name for name, out in task.loaded.names.items() if out in task.loaded.new}
    method = Method(step, model, weights, optimizer, steps, fresh)
    facts = in_words(step, method.control, steps)
    say(facts)
    run = Run(step, task, accelerator, prepared, wrapped, method, teacher, states, before, say)
    if found is not None:
        run.restore(found)
        say(f"goes on after step {run.done} of {steps}")
    if teacher is not None:
        teacher.open()
    with listening(run.stop):
        run.loop(on_step)
    made = facts.full
    if run.skipped:
        made += f"; {run.skipped} steps left out, whose gradients overflowed in fp16"
    switch(optimizer, "eval")
    method.finish()
    if teacher is not None:
        teacher.close()
    if not step.shard:
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # or it would be measured under autocast
    ranks.broadcast_buffers(model)
    task.loaded.round_to_storage()
    return Trained(task, prunable, run.before, evaluate(step, task, "after"), made)


def start(step: FinetuneStep) -> Accelerator:
    """Accelerate for this run; with it the processes know one another."""
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
    # Left to itself, accelerate takes processes without a GPU for one process each.
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
